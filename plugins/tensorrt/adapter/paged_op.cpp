#include "paged_op.h"

#include <cstring>

#include "names.h"

namespace saw::trt {

namespace {

std::string text(char const* name, int32_t value) { return std::string(name) + " is " + std::to_string(value); }

}  // namespace

std::vector<Field> PagedOp::fields() {
    return {
        {names::kLayerIdx, &layer_idx_, true},
        {names::kNumHeads, &num_heads_, true},
        {names::kNumKvHeads, &num_kv_heads_, true},
        {names::kHeadDim, &head_dim_, true},
        {names::kTokensPerBlock, &tokens_per_block_, true},
        {names::kDtype, &dtype_, true},
        {names::kKvFormat, &kv_, true},
    };
}

void PagedOp::validate() const {
    if (layer_idx_ < 0) reject(text(names::kLayerIdx, layer_idx_) + ": it counts this rank's layers from 0");
    if (num_kv_heads_ < 1) reject(text(names::kNumKvHeads, num_kv_heads_) + ": it must be at least 1");
    if (num_heads_ < num_kv_heads_ || num_heads_ % num_kv_heads_ != 0 || num_heads_ / num_kv_heads_ > 16)
        reject(text(names::kNumHeads, num_heads_) + " and " + text(names::kNumKvHeads, num_kv_heads_) +
               ": num_heads must be num_kv_heads times 1 to 16");
    if (head_dim_ != 64 && head_dim_ != 96 && head_dim_ != 128 && head_dim_ != 256)
        reject(text(names::kHeadDim, head_dim_) + ": it must be one of 64, 96, 128, 256");
    if (tokens_per_block_ != 16 && tokens_per_block_ != 32 && tokens_per_block_ != 64 && tokens_per_block_ != 128)
        reject(text(names::kTokensPerBlock, tokens_per_block_) + ": it must be one of 16, 32, 64, 128");
    check_dtype();
    check_count("the numbers of a token's Q, K and V", (num_heads_ + 2 * int64_t(num_kv_heads_)) * head_dim_,
                "num_heads, num_kv_heads or head_dim");
    if (kv_ != "fp16" && kv_ != "int4" && kv_ != "saw_int4" && kv_ != "saw_k8v4")
        reject("kv is " + kv_ + ": it must be one of fp16, int4, saw_int4, saw_k8v4");
    check_count("the bytes of a block", int64_t(tokens_per_block_) * key_row_bytes(cache(), head_dim_) * num_kv_heads_,
                "tokens_per_block, num_kv_heads or head_dim");
}

CacheType PagedOp::cache() const {
    if (kv_ == "fp16") return CacheType::kUnquantized;
    return kv_ == "saw_k8v4" ? CacheType::kKey8Value4 : CacheType::kInt4;
}

std::vector<Tensor> PagedOp::pool_inputs() {
    using nvinfer1::DataType;
    Tensor pointers{names::kPoolPointers, kAddressType, {kPools, 2}, true};
    if (kAddressType == DataType::kINT32) pointers.dims.push_back(2);
    return {{names::kBlockOffsets, DataType::kINT32, {kPools, kSequences, 2, kAny}},
            pointers,
            {names::kPoolMapping, DataType::kINT32, {kLayers, 2}, true}};
}

PagedPool PagedOp::pool(Launch const& launch, int first_input) const {
    auto const& offsets = launch.input_desc[first_input].dims;
    int64_t const num_pools = offsets.d[0], num_sequences = offsets.d[1], max_blocks = offsets.d[3];
    int64_t const num_layers = launch.input_desc[first_input + 2].dims.d[0];
    if (layer_idx_ >= num_layers)
        reject(text(names::kLayerIdx, layer_idx_) + ": host_kv_cache_pool_mapping has " + std::to_string(num_layers) +
               " layers");
    auto const* const mapping = static_cast<int32_t const*>(launch.inputs[first_input + 2]) + 2 * int64_t(layer_idx_);
    if (mapping[0] < 0 || mapping[0] >= num_pools || mapping[1] < 0)
        reject("host_kv_cache_pool_mapping puts layer " + std::to_string(layer_idx_) + " in place " +
               std::to_string(mapping[1]) + " of pool " + std::to_string(mapping[0]) + ": kv_cache_block_offsets has " +
               std::to_string(num_pools) + " pools");
    // Two addresses a pool: the primary one, in GPU memory, comes first. Not aligned where they came as INT32s.
    uint8_t* base;
    std::memcpy(&base, static_cast<uint8_t* const*>(launch.inputs[first_input + 1]) + 2 * mapping[0], sizeof(base));
    if (base == nullptr) reject("host_kv_cache_pool_pointers holds a null address: allocate the pool first");

    PagedPool pool{};
    pool.base = base;
    pool.block_offsets =
        static_cast<int32_t const*>(launch.inputs[first_input]) + mapping[0] * num_sequences * 2 * max_blocks;
    pool.max_blocks_per_seq = int(max_blocks);
    pool.layer = mapping[1];
    pool.num_kv_heads = num_kv_heads_;
    pool.tokens_per_block = tokens_per_block_;
    pool.row_bytes = row_bytes(cache(), head_dim_);
    return pool;
}

}  // namespace saw::trt
