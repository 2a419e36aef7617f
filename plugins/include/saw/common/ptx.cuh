// The instructions that CUDA C++ has no words for.
#pragma once

#include <cstdint>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace saw {

constexpr float kLog2e = 1.4426950408889634f;

// Whether this compilation is for Hopper and may use what only Hopper has: for sm_90a, and for no other.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool kHopper = true;
#else
constexpr bool kHopper = false;
#endif

// Bulk copies and barriers that count bytes.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kHasBulkCopy = true;
#else
constexpr bool kHasBulkCopy = false;
#endif

__device__ inline uint32_t shared_address(void const* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ inline void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

__device__ inline void mbarrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ inline void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

__device__ inline void mbarrier_expect(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

__device__ inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// Count, in order with what this thread wrote or has seen written before, and will read after it.
__device__ inline int count_in_order(int* counter) {
    int before;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}

// Copy bytes, a multiple of 16 between 16-byte-aligned addresses, and count them on the barrier.
__device__ inline void bulk_copy(void* shared, void const* global, uint32_t bytes, uint64_t* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(shared)),
                 "l"(global), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}

// 16 bytes from global to shared memory past the registers; of the 16 the first `bytes` are read, the others become
// zero.
__device__ inline void copy_async(uint32_t shared, void const* global, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}

__device__ inline void copy_async_8(uint32_t shared, void const* global) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared), "l"(global) : "memory");
}

// The same through the L1 cache, for what other warps of the SM read too.
__device__ inline void copy_async_cached(uint32_t shared, void const* global) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

// Until this thread's copies are there.
__device__ inline void copy_async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Programmatic dependent launch: the next grid of the stream may begin as soon as all CTAs of this one have said so, if
// it was launched for that, and it waits here until the one before has ended and what it wrote can be read.
__device__ inline void allow_next_grid() {
    if constexpr (kHasBulkCopy) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
__device__ inline void wait_for_last_grid() {
    if constexpr (kHasBulkCopy) asm volatile("griddepcontrol.wait;" ::: "memory");
}

// Order this thread's ordinary shared-memory accesses before later bulk copies into the same memory.
__device__ inline void fence_bulk_copy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Order what this thread knows of global memory before later bulk copies from it.
__device__ inline void fence_bulk_copy_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

__device__ inline void prefetch_l2(void const* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

// The copies that this thread began since the last call form a group; groups end in their order.
__device__ inline void end_copy_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until at most N of this thread's groups are under way.
template <int N>
__device__ inline void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Stores without a branch around them, after which a compiler would put off reading what is stored.
__device__ inline void store_if(bool condition, void* global, uint4 x) {
    asm volatile(
        "{\n"
        ".reg .pred condition;\n"
        "setp.ne.b32 condition, %0, 0;\n"
        "@condition st.global.v4.b32 [%1], {%2, %3, %4, %5};\n"
        "}\n" ::"r"(int(condition)),
        "l"(global), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
        : "memory");
}

__device__ inline void store_if(bool condition, void* global, uint32_t x) {
    asm volatile(
        "{\n"
        ".reg .pred condition;\n"
        "setp.ne.b32 condition, %0, 0;\n"
        "@condition st.global.b32 [%1], %2;\n"
        "}\n" ::"r"(int(condition)),
        "l"(global), "r"(x)
        : "memory");
}

// D += A B, A 16x16 (row), B 16x8 (column), fp16 or bf16 with fp32 sums.
// With g = lane / 4 and t = lane % 4 a thread holds
//   a[0..3]  (row g, k 2t 2t+1)  (row g+8, k 2t 2t+1)  (row g, k 2t+8 2t+9)  (row g+8, k 2t+8 2t+9)
//   b[0..1]  (k 2t 2t+1, column g)  (k 2t+8 2t+9, column g)
//   d[0..3]  (row g, column 2t)  (row g, column 2t+1)  (row g+8, column 2t)  (row g+8, column 2t+1)
template <typename T = __half>
__device__ inline void mma_16x8x16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                   uint32_t b1) {
    if constexpr (std::is_same_v<T, __half>) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
            "%2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, "
            "%1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
}

// D += A B, A 16x8 (row), B 8x8 (column), TF32 (an fp32 number's upper 19 bits) with fp32 sums; d as above,
//   a[0..3]  (row g, k t)  (row g+8, k t)  (row g, k t+4)  (row g+8, k t+4)
//   b[0..1]  (k t, column g)  (k t+4, column g)
__device__ inline void mma_16x8x8(float (&d)[4], float const (&a)[4], float const (&b)[2]) {
    auto const bits = [](float x) { return __float_as_uint(x); };
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(bits(a[0])), "r"(bits(a[1])), "r"(bits(a[2])), "r"(bits(a[3])), "r"(bits(b[0])), "r"(bits(b[1])));
}

// Four 8x8 matrices of 16-bit values, lanes 8i to 8i + 7 giving the 16-byte rows of the i-th: x[i] is its (row g,
// columns 2t 2t+1).
__device__ inline void load_matrices(uint32_t (&x)[4], void const* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// The same, transposed: x[i] is (rows 2t 2t+1, column g).
__device__ inline void load_matrices_transposed(uint32_t (&x)[4], void const* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// Transpose an 8x8 matrix of 16-bit values: the thread that held (row g, columns 2t 2t+1) then holds (rows 2t 2t+1,
// column g).
__device__ inline uint32_t transpose_8x8(uint32_t x) {
    uint32_t y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// A positive number with no more bits than fp16 has.
__device__ inline float to_half_bits(float x) { return __uint_as_float(__float_as_uint(x) & 0xffffe000u); }

__device__ inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ inline float tanh_fast(float x) {
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ inline float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ inline float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

}  // namespace saw
