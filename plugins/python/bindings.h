// What the bindings of all operations share. Each operation has a file with a function that adds it to the module.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "saw/common/library.h"

namespace saw::python {

namespace py = pybind11;
using ReleaseGil = py::call_guard<py::gil_scoped_release>;

using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// The device that a launch goes to, and back to the caller's.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device) {
        saw_get_device(&before_);
        changed_ = device >= 0 && device != before_ && saw_set_device(device) == cudaSuccess;
    }
    ~DeviceGuard() {
        if (changed_) saw_set_device(before_);
    }
    DeviceGuard(DeviceGuard const&) = delete;
    DeviceGuard& operator=(DeviceGuard const&) = delete;

  private:
    int before_ = -1;
    bool changed_ = false;
};

void add_all_gather(py::module_& m);
void add_all_reduce(py::module_& m);
void add_gemm(py::module_& m);
void add_lookup(py::module_& m);
void add_rms_norm(py::module_& m);
void add_rotate_quantize_kv(py::module_& m);
void add_paged_attention(py::module_& m);
void add_quantized_gemm(py::module_& m);
void add_sample(py::module_& m);
void add_silu_mul(py::module_& m);

}  // namespace saw::python
