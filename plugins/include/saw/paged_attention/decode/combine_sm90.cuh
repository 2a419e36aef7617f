// Decode: from the warps' sums to the output, through the workspace where several CTAs share a sequence.
// A part of pipeline_sm90.cuh, which includes it.
#pragma once

#include "saw/common/vec.cuh"
#include "saw/paged_attention/decode/pipeline_sm90.cuh"

namespace saw {

// A sequence's tiles of this split are done, up to `done` on the work list; `more` follow. Give its output, and true,
// or write a partial sum.
template <typename Config>
template <typename T>
__device__ bool DecodeSm90Kernel<Config>::finish_sequence(int done, bool more, float* scratch) {
    merge_warps(scratch);
    DecodeCursor const& c = shared.cursors[which];
    int const begin = shared.splits.begin(split);
    if (threadIdx.x == 0 && more) {
        DecodeCursor next = c;
        next_sequence(next);
        shared.cursors[which ^ 1] = next;
    }
    bool const whole = c.begin >= begin && c.begin + c.num_tiles == done;
    if (whole) {
        write_output<T>();
    } else {
        // A split leaves at most two: of the sequence that it begins in, and of the one that it ends in.
        write_partial(partial_of(split, c.begin > begin));
    }
    // The stage that served as scratch becomes a bulk copy's target again.
    fence_bulk_copy();
    __syncthreads();
    return whole;
}

// One thread, after a barrier that has brought it the others' writes: say that the partial sum of a sequence is there.
// True if it was the last of all, whose splits it finds while it waits for the count.
template <typename Config>
__device__ bool DecodeSm90Kernel<Config>::count_partial(DecodeCursor const& c, int& first_split,
                                                        int& last_split) const {
    int* const counter = counters + c.sequence * p.pool.num_kv_heads + kv_head;
    int const before = count_in_order(counter);
    first_split = shared.splits.of(c.begin);
    last_split = shared.splits.of(c.begin + c.num_tiles - 1);
    bool const is_last = before == last_split - first_split;
    if (is_last) *counter = 0;  // for the next launch
    return is_last;
}

// Add the four warps' sums. Warp w then holds dims 2w and 2w + 1 of each word in out[.][.][0], and all hold max and
// sum.
template <typename Config>
__device__ void DecodeSm90Kernel<Config>::merge_warps(float* scratch) {
#pragma unroll
    for (int n = 0; n < Config::kQueryTiles; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int d = 4; d < 32; d *= 2) {
                query_sum[n][i] += __shfl_xor_sync(~0u, query_sum[n][i], d);
                query_lo[n][i] += __shfl_xor_sync(~0u, query_lo[n][i], d);
            }
            if (g == 0) {
                shared.max[warp][n * 8 + 2 * t + i] = query_max[n][i];
                shared.sum[warp][n * 8 + 2 * t + i] = query_sum[n][i];
            }
        }
    __syncthreads();
    float rescale[Config::kQueryTiles][2];
#pragma unroll
    for (int n = 0; n < Config::kQueryTiles; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            int const query = n * 8 + 2 * t + i;
            float top = kNoMax, total = 0.0f;
#pragma unroll
            for (int w = 0; w < Config::kWarps; ++w) top = fmaxf(top, shared.max[w][query]);
#pragma unroll
            for (int w = 0; w < Config::kWarps; ++w)
                total += shared.sum[w][query] * exp2_fast(shared.max[w][query] - top);
            rescale[n][i] = exp2_fast(query_max[n][i] - top);
            query_max[n][i] = top;
            query_sum[n][i] = total;
        }
#pragma unroll
    for (int n = 0; n < Config::kQueryTiles; ++n)
#pragma unroll
        for (int j = 0; j < Config::kValueSteps; ++j)
#pragma unroll
            for (int m = 0; m < 4; ++m)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float const unit = i < 2 ? kCodeUnit : kCodeUnit / 16;
                    out[n][j][m][i] = (out[n][j][m][i] * unit + query_lo[n][i % 2]) * rescale[n][i % 2];
                }
    // Every warp leaves its dims 2m and 2m + 1 of all words, and warp m takes the four copies; for as many m at a time
    // as the scratch holds.
    bool const any_query = 2 * t < group;  // in a group of 4 or fewer, half of the lanes have none
    constexpr int kSlice = Config::kQueryTiles * Config::kValueSteps * 4;
    constexpr int kAtOnce = Config::kStageBytes / (Config::kWarps * kSlice * 32 * sizeof(float)) >= 4   ? 4
                            : Config::kStageBytes / (Config::kWarps * kSlice * 32 * sizeof(float)) >= 2 ? 2
                                                                                                        : 1;
    static_assert(kAtOnce * Config::kWarps * kSlice * 32 * sizeof(float) <= Config::kStageBytes,
                  "scratch is one stage");
#pragma unroll
    for (int first = 0; first < 4; first += kAtOnce) {
#pragma unroll
        for (int m = first; m < first + kAtOnce; ++m)
#pragma unroll
            for (int x = 0; x < kSlice && any_query; ++x)
                scratch[(((m - first) * Config::kWarps + warp) * kSlice + x) * 32 + lane] =
                    out[x / 4 / Config::kValueSteps][x / 4 % Config::kValueSteps][m][x % 4];
        __syncthreads();
        if (any_query && warp >= first && warp < first + kAtOnce) {
#pragma unroll
            for (int x = 0; x < kSlice; ++x) {
                float total = 0.0f;
#pragma unroll
                for (int w = 0; w < Config::kWarps; ++w)
                    total += scratch[(((warp - first) * Config::kWarps + w) * kSlice + x) * 32 + lane];
                out[x / 4 / Config::kValueSteps][x / 4 % Config::kValueSteps][0][x % 4] = total;
            }
        }
        if (first + kAtOnce < 4) __syncthreads();
    }
}

// What a sum of exp2(score - max) values is divided by, the head's sink included.
template <typename Config>
__device__ float DecodeSm90Kernel<Config>::normalizer(int query_head, float max, float sum) const {
    if (p.sinks == nullptr) return __fdividef(1.0f, sum);
    float const sink = p.sinks[query_head] * kLog2e;
    float const top = fmaxf(max, sink);
    float const rescale = exp2_fast(max - top);
    return rescale / (sum * rescale + exp2_fast(sink - top));
}

// After merge_warps, for a sequence that this CTA has whole.
template <typename Config>
template <typename T>
__device__ void DecodeSm90Kernel<Config>::write_output() {
    DecodeCursor const& c = shared.cursors[which];
#pragma unroll
    for (int n = 0; n < Config::kQueryTiles; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            int const query = n * 8 + 2 * t + i;
            if (query >= group) continue;
            int const head = kv_head * group + query;
            float const scale = normalizer(head, query_max[n][i], query_sum[n][i]);
            T* row = static_cast<T*>(p.out) + (size_t(c.sequence) * p.num_heads + head) * Config::kHeadDim;
#pragma unroll
            for (int j = 0; j < Config::kValueSteps; ++j) {
                int const word = g + 8 * j;
                if (word >= Config::kWords) continue;
                T const pair[2] = {from_float<T>(out[n][j][0][i] * scale), from_float<T>(out[n][j][0][2 + i] * scale)};
                *reinterpret_cast<uint32_t*>(row + word * 8 + 2 * warp) = *reinterpret_cast<uint32_t const*>(pair);
            }
        }
}

template <typename Config>
__device__ void DecodeSm90Kernel<Config>::write_partial(float* partial) {
#pragma unroll
    for (int n = 0; n < Config::kQueryTiles; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            int const query = n * 8 + 2 * t + i;
            if (query >= group) continue;
#pragma unroll
            for (int j = 0; j < Config::kValueSteps; ++j) {
                int const word = g + 8 * j;
                if (word >= Config::kWords) continue;
                float2 const pair = make_float2(out[n][j][0][i], out[n][j][0][2 + i]);
                *reinterpret_cast<float2*>(partial + query * Config::kHeadDim + word * 8 + 2 * warp) = pair;
            }
            if (warp == 0 && g == 0) {
                partial[group * Config::kHeadDim + query] = query_max[n][i];
                partial[group * (Config::kHeadDim + 1) + query] = query_sum[n][i];
            }
        }
}

// Add up the partial sums of a sequence's splits, in an order that does not depend on who was last. One of `workers`
// warps, which begins the loads of AtOnce before it waits for one.
template <typename Config>
template <typename T, int AtOnce>
__device__ void DecodeSm90Kernel<Config>::combine(DecodeCursor const& c, int first_split, int count, int worker,
                                                  int workers) const {
    size_t const size = decode_partial_floats(group, Config::kHeadDim);
    float const* const base = partial_of(first_split, false);
    // The first may have begun in an earlier sequence; then this one's is its second.
    float const* const head = partial_of(first_split, shared.splits.begin(first_split) < c.begin);
    for (int x = (worker * 32 + lane) * 4; x < group * Config::kHeadDim; x += workers * 128) {
        int const query = x / Config::kHeadDim, max_at = group * Config::kHeadDim + query;
        DecodeSum total;
        for (int first = 0; first < count; first += AtOnce) {
            float4 sums[AtOnce];
            float max[AtOnce], mass[AtOnce];
#pragma unroll
            for (int u = 0; u < AtOnce; ++u) {
                int const i = min(first + u, count - 1);
                float const* const partial = i == 0 ? head : base + i * size;
                sums[u] = __ldcg(reinterpret_cast<float4 const*>(partial + x));
                max[u] = first + u < count ? __ldcg(partial + max_at) : kNoMax;
                mass[u] = __ldcg(partial + max_at + group);
            }
            float higher = total.max;
#pragma unroll
            for (int u = 0; u < AtOnce; ++u) higher = fmaxf(higher, max[u]);
            total.raise(higher);
#pragma unroll
            for (int u = 0; u < AtOnce; ++u) total.add(sums[u], max[u], mass[u]);
        }
        write_sum<T>(c.sequence, x, query, total);
    }
}

// Within the work list: one warp counts the partial sum of the sequence that ended, and adds them up if it was the
// last. The others go on.
template <typename Config>
template <typename T>
__device__ void DecodeSm90Kernel<Config>::combine_on_the_way() const {
    DecodeCursor const& c = shared.cursors[which];
    int first_split = 0, last_split = 0, is_last = 0;
    if (lane == 0) is_last = count_partial(c, first_split, last_split);
    __syncwarp();
    if (!__shfl_sync(~0u, is_last, 0)) return;
    first_split = __shfl_sync(~0u, first_split, 0);
    last_split = __shfl_sync(~0u, last_split, 0);
    combine<T, 4>(c, first_split, last_split - first_split + 1, 0, 1);
}

// At the end of a split: the same by all warps. The copy engine brings the partial sums to the stages, which are empty:
// a split's lie one after another, so that it takes one copy a stage, and little code that no one has fetched before.
template <typename Config>
template <typename T>
__device__ void DecodeSm90Kernel<Config>::combine_at_end(int slot, uint32_t parity) {
    DecodeCursor const& c = shared.cursors[which];
    int const size = decode_partial_floats(group, Config::kHeadDim), bytes = size * sizeof(float);
    // Where a stage holds few, they come by ordinary loads.
    constexpr int kLargest = decode_partial_floats(Config::kMaxQueries, Config::kHeadDim) * sizeof(float);
    constexpr bool kBulk = Config::kStageBytes / kLargest >= 8;
    int const at_once = Config::kStageBytes / bytes;
    int first_split = 0, count = 0;
    auto const load_sums = [&](int first, int slot) {
        int const copies = min(at_once, count - first);
        mbarrier_arrive_expect(&shared.full[slot], copies * bytes);
        // The first split may have begun in an earlier sequence; then this one's is its second.
        bool const apart = first == 0 && shared.splits.begin(first_split) < c.begin;
        if (apart) bulk_copy(shared.stages[slot], partial_of(first_split, true), bytes, &shared.full[slot]);
        if (copies > apart)
            bulk_copy(shared.stages[slot] + apart * bytes, partial_of(first_split + first + apart, false),
                      (copies - apart) * bytes, &shared.full[slot]);
    };
    if (threadIdx.x == 0) {
        int last_split;
        if (count_partial(c, first_split, last_split)) {
            count = last_split - first_split + 1;
            if constexpr (kBulk) fence_bulk_copy_global();
#pragma unroll 1
            for (int i = 0, at = slot; kBulk && i < Config::kStages && i * at_once < count; ++i) {
                load_sums(i * at_once, at);
                at = at + 1 == Config::kStages ? 0 : at + 1;
            }
        }
        shared.first_partial = first_split;
        shared.partials = count;
    }
    __syncthreads();
    count = shared.partials;
    if (count == 0) return;
    if constexpr (!kBulk) {
        combine<T, 8>(c, shared.first_partial, count, warp, Config::kWarps);
        return;
    }
    constexpr int kElements =
        (Config::kMaxQueries * Config::kHeadDim + 4 * Config::kThreads - 1) / (4 * Config::kThreads);
    DecodeSum total[kElements];
    for (int first = 0; first < count; first += at_once) {
        mbarrier_wait(&shared.full[slot], parity);
        int const here = min(at_once, count - first);
#pragma unroll
        for (int e = 0; e < kElements; ++e) {
            int const x = (e * Config::kThreads + threadIdx.x) * 4, query = x / Config::kHeadDim;
            if (query >= group) break;
            auto const* const sums = reinterpret_cast<float const*>(shared.stages[slot]);
            float const* const max = sums + group * Config::kHeadDim + query;
            float higher = total[e].max;
#pragma unroll 4
            for (int i = 0; i < here; ++i) higher = fmaxf(higher, max[i * size]);
            total[e].raise(higher);
#pragma unroll 2
            for (int i = 0; i < here; ++i)
                total[e].add(*reinterpret_cast<float4 const*>(sums + i * size + x), max[i * size],
                             max[i * size + group]);
        }
        int const ahead = first + Config::kStages * at_once;
        if (ahead < count) {
            __syncthreads();
            if (threadIdx.x == 0) load_sums(ahead, slot);
        }
        int ignored;
        uint32_t ignored_parity;
        step(slot, parity, ignored, ignored_parity);
    }
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
        int const x = (e * Config::kThreads + threadIdx.x) * 4, query = x / Config::kHeadDim;
        if (query < group) write_sum<T>(c.sequence, x, query, total[e]);
    }
}

// Four elements of the output, from x on, of a sequence's heads.
template <typename Config>
template <typename T>
__device__ void DecodeSm90Kernel<Config>::write_sum(int sequence, int x, int query, DecodeSum const& total) const {
    float const scale = normalizer(kv_head * group + query, total.max, total.sum);
    T const four[4] = {from_float<T>(total.out.x * scale), from_float<T>(total.out.y * scale),
                       from_float<T>(total.out.z * scale), from_float<T>(total.out.w * scale)};
    T* const rows = static_cast<T*>(p.out) + (size_t(sequence) * p.num_heads + kv_head * group) * Config::kHeadDim;
    *reinterpret_cast<uint2*>(rows + x) = *reinterpret_cast<uint2 const*>(four);
}

}  // namespace saw
