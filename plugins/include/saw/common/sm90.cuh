// What only Hopper's tensor cores and register file take, in the words of PTX.
#pragma once

#include <cstdint>

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "saw/common/ptx.cuh"

namespace saw {

template <int Registers>
__device__ inline void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

template <int Registers>
__device__ inline void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

// Barriers 1 to 15 among some warps of a CTA; 0 is __syncthreads.
__device__ inline void named_barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ inline void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Until all threads of the cluster are here, and what they wrote before can be read.
__device__ inline void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// From the shared memory of a CTA of the cluster, what lies there where `shared` lies in this one's.
__device__ inline float4 load_of_cluster(float const* shared, int cta) {
    float4 x;
    asm volatile(
        "{\n"
        ".reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %4, %5;\n"
        "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n"
        "}\n"
        : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
        : "r"(shared_address(shared)), "r"(cta)
        : "memory");
    return x;
}

// A box of a tensor to shared memory, swizzled as below, and its bytes counted on the barrier.
__device__ inline void copy_box(void* shared, CUtensorMap const& map, uint64_t* barrier, int x, int y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
            shared_address(shared)),
        "l"(&map), "r"(shared_address(barrier)), "r"(x), "r"(y)
        : "memory");
}

// Where an operand of wgmma lies in shared memory: rows of 128 bytes, whose 16-byte chunk c of row r lies at c ^ (r %
// 8). `group_stride` is from 8 rows to the next 8. `box_stride` is from 64 columns to the next 64, for the operand
// whose rows are the reduction index (V); the other (Q and K) is stepped through its boxes by hand.
__device__ inline uint64_t swizzled_operand(uint32_t address, uint32_t group_stride, uint32_t box_stride) {
    constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;
    return kSwizzle128 | uint64_t(group_stride >> 4) << 32 | uint64_t((box_stride >> 4) & 0x3fff) << 16 |
           uint64_t((address & 0x3ffff) >> 4);
}

// The same operand some bytes further on: one addition, where to describe it anew takes four instructions.
__device__ inline uint64_t later_operand(uint64_t operand, uint32_t bytes) {
    return (operand & 0xffffffff00000000) | uint32_t(uint32_t(operand) + (bytes >> 4));
}

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int Pending>
__device__ inline void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// Keeps the compiler from touching the registers of a product before this point.
template <int N>
__device__ inline void hold(float (&registers)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

template <int N>
__device__ inline void hold(uint32_t (&registers)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

// D (+)= A B for 64 rows of A and N columns of B over 16 of the reduction index, in fp32, by a warpgroup. A is in
// shared memory (`shared`, its rows contiguous as B's columns are) or in registers (`registers`, B's rows contiguous,
// or `registers_by_columns`, B's columns contiguous). With g = lane / 4 and t = lane % 4, warp w holds of D: d[4 j + 2
// h + i] = row 16 w + g + 8 h, column 8 j + 2 t + i, and of A what mma.m16n8k16 takes (ptx.cuh).
template <typename T, int N>
struct Wgmma;

// Operands of D: their names in the text from the first on, and the registers after them.
#define SAW_D4 "%0, %1, %2, %3"
#define SAW_D8 SAW_D4 ", %4, %5, %6, %7"
#define SAW_D16 SAW_D8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define SAW_D32 SAW_D16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SAW_D48 SAW_D32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define SAW_D64 SAW_D48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SAW_D128                                                                                   \
    SAW_D64                                                                                        \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "           \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define SAW_FROM4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SAW_FROM16(i) SAW_FROM4(i), SAW_FROM4(i + 4), SAW_FROM4(i + 8), SAW_FROM4(i + 12)
#define SAW_OPERANDS4 SAW_FROM4(0)
#define SAW_OPERANDS8 SAW_OPERANDS4, SAW_FROM4(4)
#define SAW_OPERANDS16 SAW_FROM16(0)
#define SAW_OPERANDS32 SAW_OPERANDS16, SAW_FROM16(16)
#define SAW_OPERANDS48 SAW_OPERANDS32, SAW_FROM16(32)
#define SAW_OPERANDS64 SAW_OPERANDS48, SAW_FROM16(48)
#define SAW_OPERANDS128 SAW_OPERANDS64, SAW_FROM16(64), SAW_FROM16(80), SAW_FROM16(96), SAW_FROM16(112)

// What follows D: A's registers or its place, B's place, and whether D is added to; a0 and so on are their numbers.
#define SAW_REGISTERS(name, type, N, count, a0, a1, a2, a3, a4, a5, order)                             \
    static __device__ void name(float (&d)[count], uint32_t const* a, uint64_t b, bool accumulate) {   \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #a5                                          \
                     ", 0;\n"                                                                          \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type " {" SAW_D##count \
                     "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #a4 ", p, 1, 1, " order ";\n}\n" \
                     : SAW_OPERANDS##count                                                             \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)));      \
    }
#define SAW_WGMMA(T, type, N, count, a0, a1, a2, a3, a4, a5)                                               \
    template <>                                                                                            \
    struct Wgmma<T, N> {                                                                                   \
        static __device__ void shared(float (&d)[count], uint64_t a, uint64_t b, bool accumulate) {        \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #a2                                          \
                         ", 0;\n"                                                                          \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type " {" SAW_D##count \
                         "}, %" #a0 ", %" #a1 ", p, 1, 1, 0, 0;\n}\n"                                      \
                         : SAW_OPERANDS##count                                                             \
                         : "l"(a), "l"(b), "r"(int(accumulate)));                                          \
        }                                                                                                  \
        SAW_REGISTERS(registers, type, N, count, a0, a1, a2, a3, a4, a5, "1")                              \
        SAW_REGISTERS(registers_by_columns, type, N, count, a0, a1, a2, a3, a4, a5, "0")                   \
    };
#define SAW_WGMMA_OF_BOTH(N, ...)            \
    SAW_WGMMA(__half, "f16", N, __VA_ARGS__) \
    SAW_WGMMA(__nv_bfloat16, "bf16", N, __VA_ARGS__)
SAW_WGMMA_OF_BOTH(8, 4, 4, 5, 6, 7, 8, 9)
SAW_WGMMA_OF_BOTH(16, 8, 8, 9, 10, 11, 12, 13)
SAW_WGMMA_OF_BOTH(32, 16, 16, 17, 18, 19, 20, 21)
SAW_WGMMA_OF_BOTH(64, 32, 32, 33, 34, 35, 36, 37)
SAW_WGMMA_OF_BOTH(96, 48, 48, 49, 50, 51, 52, 53)
SAW_WGMMA_OF_BOTH(128, 64, 64, 65, 66, 67, 68, 69)
SAW_WGMMA_OF_BOTH(256, 128, 128, 129, 130, 131, 132, 133)
#undef SAW_WGMMA_OF_BOTH
#undef SAW_WGMMA
#undef SAW_REGISTERS
#undef SAW_FROM4
#undef SAW_FROM16
#undef SAW_D4
#undef SAW_OPERANDS4
#undef SAW_D8
#undef SAW_OPERANDS8
#undef SAW_D16
#undef SAW_OPERANDS16
#undef SAW_D32
#undef SAW_OPERANDS32
#undef SAW_D48
#undef SAW_OPERANDS48
#undef SAW_D64
#undef SAW_OPERANDS64
#undef SAW_D128
#undef SAW_OPERANDS128

}  // namespace saw
