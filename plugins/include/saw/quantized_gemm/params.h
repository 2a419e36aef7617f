// Linear layers whose weights have 4 or 8 bits, as host functions; common/library.h says what is true of all of them.
#pragma once

#include <cstdint>

#include "saw/common/library.h"
#include "saw/common/pool.h"

namespace saw {

enum class WeightType : int { kInt4, kFloat8 };

constexpr int kChunk = 128;     // inputs that have a scale in common, where groups are no smaller
constexpr int kBlockRows = 64;  // rows of a weight that lie together

// A weight [out_features, in_features] of a linear layer, filled up to blocks of kBlockRows rows and kChunk inputs.
// saw_trtllm/ops/quantized_gemm.py packs it.
struct PackedWeight {
    // [blocks, chunks, 4 (warp), 2 or 4, 32 (lane), 4] words: of kInt4 a word has a lane's numbers of a step of 16
    // inputs, of kFloat8 two words have them, as weights.cuh says.
    void const* values;
    // [blocks, chunks, kChunk / group, 4 (warp), 8, 2]: at [w, g, h] of row 16 w + 8 h + g. fp32 numbers, whose lower 5
    // bits are of kInt4 the zero point, 0 to 16.
    uint32_t const* scales;
    WeightType type;
    int in_features;   // a multiple of 16
    int out_features;  // a multiple of 8
    int group;         // inputs that share a scale: 32, 64 or kChunk, of kFloat8 kChunk
};

// y = x · weightᵀ: weights are exact in the activations' dtype before their scale, sums are in fp32, scales are applied
// to the sums of a group, and y is rounded once. The same rows in the same number give the same bits. Tensors lie on
// multiples of 16 bytes. The weight must not be written by the kernel that is before this one on the stream: on Hopper
// it is read before that has ended.
struct QuantizedGemmParams {
    void const* x;  // [num_rows, in_features] of dtype
    PackedWeight weight;
    void* y;  // [num_rows, out_features] of dtype
    int num_rows;
    DType dtype;
};
// For few rows: each 64 read the weight again. With more than kFewRows it is faster to dequantize the weight and have a
// dense product.
constexpr int kFewRows = 192;
SAW_API cudaError_t saw_quantized_gemm(QuantizedGemmParams const& params, cudaStream_t stream);

// Rows of a weight, each number rounded once, for a product of many rows.
struct DequantizeParams {
    PackedWeight weight;
    int first_row;  // a multiple of kBlockRows
    int num_rows;
    void* y;  // [num_rows, in_features] of dtype
    DType dtype;
};
SAW_API cudaError_t saw_dequantize(DequantizeParams const& params, cudaStream_t stream);

// What a product of FP8 by FP8 takes: rows of e4m3 numbers and a scale for each.
struct Float8Rows {
    void* values;   // [num_rows, width]
    float* scales;  // [num_rows]
};

// Rows of activations, each over its largest number's 448th (over 1 if all are 0) and rounded to the nearest.
struct QuantizeRowsParams {
    void const* x;  // [num_rows, width] of dtype
    int num_rows;
    int width;  // a multiple of 16
    DType dtype;
    Float8Rows y;
};
SAW_API cudaError_t saw_quantize_rows(QuantizeRowsParams const& params, cudaStream_t stream);

// Rows of a weight of kFloat8 whose chunks have one scale, as they were before they were packed.
struct UnpackRowsParams {
    PackedWeight weight;
    int first_row;  // a multiple of kBlockRows
    int num_rows;
    Float8Rows y;  // in_features wide
};
SAW_API cudaError_t saw_unpack_rows(UnpackRowsParams const& params, cudaStream_t stream);

}  // namespace saw
