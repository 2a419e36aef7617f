// Decode: from the warps' sums to the output, through the workspace where several CTAs share a sequence.
// A part of pipeline_sm80.cuh, which includes it.
#pragma once

#include "saw/common/vec.cuh"
#include "saw/paged_attention/decode/pipeline_sm80.cuh"

namespace saw {

// The sequence's tiles of this split are done, and the warp's last was in used_slot (-1: it had none): give the
// sequence's output, or a partial sum.
template <typename Config>
__device__ void DecodeSm80Kernel<Config>::finish_sequence(int used_slot) {
    __syncwarp();
    if (lane == 0) shared.scratch_slot[warp] = used_slot;
    if (used_slot >= 0)
        rows.store_sums(reinterpret_cast<float*>(shared.stages[warp][used_slot]), shared.max[warp], shared.sum[warp],
                        view.group);
    __syncthreads();
    DecodeCursor const& c = mine().now;
    DecodeSplits const splits = mine().splits;
    int const begin = splits.begin(split), end = splits.begin(split + 1);
    bool const whole = c.begin >= begin && c.begin + c.num_tiles <= end;
    // A split leaves at most two: of the sequence that it begins in, and of the one that it ends in.
    float* const partial = partial_of(split, c.begin > begin);
    for (int x = threadIdx.x * 4; x < view.group * kHeadDim; x += Config::kThreads * 4) {
        int const query = x / kHeadDim, dim = x % kHeadDim;
        Part const part = gather(query, dim);
        if (whole)
            write_output(part, c.sequence, query, dim);
        else
            store_partial(partial, part, query, dim);
    }
    __syncthreads();  // the slots that served as scratch become copies' targets again
    if (whole) return;
    int const first_split = splits.of(c.begin), last_split = splits.of(c.begin + c.num_tiles - 1);
    if (is_last(c.sequence, last_split - first_split)) combine(c, first_split, last_split);
}

template <typename Config>
__device__ typename DecodeSm80Kernel<Config>::Part DecodeSm80Kernel<Config>::gather(int query, int dim) const {
    Part part{DecodeSoftmax<1, 1>::kNoMax, 0.0f, {}};
#pragma unroll
    for (int w = 0; w < Config::kWarps; ++w) {
        int const slot = shared.scratch_slot[w];
        if (slot < 0) continue;
        float const* const scratch = reinterpret_cast<float const*>(shared.stages[w][slot]) + query * kHeadDim;
        auto const low = *reinterpret_cast<float2 const*>(scratch + Rows::scratch_dim(query, dim));
        auto const high = *reinterpret_cast<float2 const*>(scratch + Rows::scratch_dim(query, dim + 2));
        part.add({shared.max[w][query], shared.sum[w][query], {low.x, low.y, high.x, high.y}});
    }
    return part;
}

template <typename Config>
__device__ void DecodeSm80Kernel<Config>::store_partial(float* partial, Part const& part, int query, int dim) const {
    *reinterpret_cast<float4*>(partial + query * kHeadDim + dim) =
        make_float4(part.out[0], part.out[1], part.out[2], part.out[3]);
    if (dim == 0) {
        partial[view.group * kHeadDim + query] = part.max;
        partial[view.group * (kHeadDim + 1) + query] = part.sum;
    }
}

// Say that this CTA's partial sum is there. Whether all others' of the sequence are there, too.
template <typename Config>
__device__ bool DecodeSm80Kernel<Config>::is_last(int sequence, int others) {
    if (threadIdx.x == 0) {
        __threadfence();  // the barrier has brought the other threads' writes before this fence
        int* const counter = counters + sequence * p.pool.num_kv_heads + kv_head;
        int const shift = 16 * blockIdx.x;  // a head's two CTAs share its counter
        bool const last = (atomicAdd(counter, 1 << shift) >> shift & 0xffff) == others;
        if (last) atomicSub(counter, (others + 1) << shift);  // for the next launch
        __threadfence();
        shared.is_last = last;
    }
    __syncthreads();
    return shared.is_last;
}

// Add up the partial sums of a sequence's splits, in an order that does not depend on who was last.
template <typename Config>
__device__ void DecodeSm80Kernel<Config>::combine(DecodeCursor const& c, int first_split, int last_split) const {
    // The first may have begun in an earlier sequence; then this one's is its second.
    float const* const head = partial_of(first_split, mine().splits.begin(first_split) < c.begin);
    for (int x = threadIdx.x * 4; x < view.group * kHeadDim; x += Config::kThreads * 4) {
        int const query = x / kHeadDim;
        Part total{DecodeSoftmax<1, 1>::kNoMax, 0.0f, {}};
#pragma unroll 8
        for (int split = first_split; split <= last_split; ++split) {
            float const* const partial = split == first_split ? head : partial_of(split, false);
            float4 const o = __ldcg(reinterpret_cast<float4 const*>(partial + x));
            float const max = __ldcg(partial + view.group * kHeadDim + query);
            float const sum = __ldcg(partial + view.group * (kHeadDim + 1) + query);
            total.add({max, sum, {o.x, o.y, o.z, o.w}});
        }
        write_output(total, c.sequence, query, x % kHeadDim);
    }
}

// The head's sink takes its share of the softmax and has no value.
template <typename Config>
__device__ void DecodeSm80Kernel<Config>::write_output(Part const& part, int sequence, int query, int dim) const {
    int const head = first_head + query;
    float scale = __fdividef(1.0f, part.sum);
    if (p.sinks != nullptr) {
        float const sink = p.sinks[head] * kLog2e;
        float const top = fmaxf(part.max, sink);
        float const rescale = exp2_fast(part.max - top);
        scale = rescale / (part.sum * rescale + exp2_fast(sink - top));
    }
    T const four[4] = {from_float<T>(part.out[0] * scale), from_float<T>(part.out[1] * scale),
                       from_float<T>(part.out[2] * scale), from_float<T>(part.out[3] * scale)};
    T* const row = static_cast<T*>(p.out) + (size_t(sequence) * p.num_heads + head) * kHeadDim;
    *reinterpret_cast<uint2*>(row + dim) = *reinterpret_cast<uint2 const*>(four);
}

template <typename Config>
__device__ void DecodeSm80Kernel<Config>::zero_empty_sequences() const {
    int const n = p.num_heads * kHeadDim;
    for (int s = split * columns() + column(); s < p.num_sequences; s += gridDim.z * columns()) {
        if (p.sequence_length[s] > 0) continue;
        for (int i = threadIdx.x; i < n; i += Config::kThreads) static_cast<T*>(p.out)[size_t(s) * n + i] = T(0.0f);
    }
}

}  // namespace saw
