// The few entry points of cuBLASLt that SawGemm and SawQuantizedGemm call. Found when the first plugin of them starts:
// neither a build of this library nor an engine without them needs cuBLASLt. Types and numbers are those of cuBLASLt 12
// and 13.
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_runtime.h>
#include <library_types.h>

namespace saw::trt::cublaslt {

using Status = int;
using Handle = void*;
using Desc = void*;  // of a product, a matrix or a preference

struct Algo {
    uint64_t data[8];
};
struct Heuristic {
    Algo algo;
    size_t workspace_bytes;
    Status state;
    float waves;
    int reserved[4];
};

constexpr int kComputeF32 = 68;
constexpr int32_t kTranspose = 1;
constexpr uint32_t kReduceInComputeType = 2;
constexpr int32_t kScaleOfEachRow = 3;  // from 12.9 on
// Attributes: of a product, of a preference.
constexpr int kTransA = 3, kScale[] = {17, 18}, kScaleMode[] = {31, 32};  // the last two of A and of B
constexpr int kMaxWorkspaceBytes = 1, kReductionSchemes = 3, kMinAlignment[] = {5, 6, 7, 8};  // of A, B, C, D

struct Library {
    Status (*create)(Handle*);
    char const* (*status_name)(Status);
    Status (*product_create)(Desc*, int compute_type, cudaDataType scale_type);
    Status (*product_set)(Desc, int attribute, void const*, size_t bytes);
    Status (*product_destroy)(Desc);
    Status (*matrix_create)(Desc*, cudaDataType, uint64_t rows, uint64_t columns, int64_t leading_dimension);
    Status (*matrix_destroy)(Desc);
    Status (*preference_create)(Desc*);
    Status (*preference_set)(Desc, int attribute, void const*, size_t bytes);
    Status (*preference_destroy)(Desc);
    Status (*heuristic)(Handle, Desc product, Desc a, Desc b, Desc c, Desc d, Desc preference, int wanted, Heuristic*,
                        int* found);
    Status (*matmul)(Handle, Desc product, void const* alpha, void const* a, Desc a_desc, void const* b, Desc b_desc,
                     void const* beta, void const* c, Desc c_desc, void* d, Desc d_desc, Algo const*, void* workspace,
                     size_t workspace_bytes, cudaStream_t);
};

// The process's. A PluginError if there is none.
Library const& library();
// The current device's: threads share it.
Handle handle();
// A PluginError if a call was not successful.
void check(Status status, char const* what);

// y = x · weightᵀ, all of rows: x [rows, in], weight [out, in], y [rows, out] whose rows begin y_stride apart.
struct Linear {
    int64_t rows, in, out, y_stride;
    cudaDataType type, output_type;  // of x and weight; of y
};
// What x and weight, both of CUDA_R_8F_E4M3, have a scale of for each row.
struct RowScales {
    float const* of_x;       // [rows]
    float const* of_weight;  // [out]
};
// What NVIDIA recommends for Hopper.
constexpr size_t kWorkspaceBytes = size_t(32) << 20;
// What TensorRT's tensors have, and the fastest kernels need.
constexpr uint32_t kAlignment = 16;
// By the algorithm that cuBLASLt's heuristic finds the best. A PluginError if there is none.
void multiply(Linear const& linear, void const* x, void const* weight, void* y, void* workspace, cudaStream_t stream);
// The same of numbers in e4m3, with a scale for each row of x and of weight. False, and nothing is done, if cuBLASLt
// has no such product: it has it on Hopper, from 12.9 on. Whether it has is to be asked before x and weight are made.
bool has_scaled(Linear linear, RowScales const& scales);
bool multiply_scaled(Linear const& linear, RowScales const& scales, void const* x, void const* weight, void* y,
                     void* workspace, cudaStream_t stream);

}  // namespace saw::trt::cublaslt
