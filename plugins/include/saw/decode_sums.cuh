// Decode: from the warps' sums to the output, through the workspace where several CTAs share a sequence.
// A part of decode_attention.cuh, which includes it.
#pragma once

namespace saw {

// A sequence's tiles of this piece are done, up to `done` on the line: give its output, or a partial sum. False at the
// end of the piece.
template <typename Config>
template <typename T>
__device__ bool DecodeKernel<Config>::finish_sequence(int done, float* scratch) {
    merge_warps(scratch);
    DecodeCursor const& c = shared.cursors[which];
    int const begin = shared.pieces.begin(piece);
    bool const more = done < shared.pieces.begin(piece + 1);
    if (threadIdx.x == 0 && more) {
        DecodeCursor next = c;
        next_sequence(next);
        shared.cursors[which ^ 1] = next;
    }
    bool const whole = c.begin >= begin && c.begin + c.num_tiles == done;
    if (whole) {
        write_output<T>();
    } else {
        // A piece leaves at most two: of the sequence that it begins in, and of the one that it ends in.
        bool const second = c.begin > begin;
        write_partial(partials + (size_t(blockIdx.x) * 2 + second) * decode_partial_floats(group, Config::kHeadDim));
    }
    // The stage that served as scratch becomes a bulk copy's target again.
    fence_bulk_copy();
    __syncthreads();
    if (!whole) leave_partial<T>(c, more);
    which ^= 1;
    return more;
}

// Say that a partial sum is there, and add them up if it was the last. Within the line warp 0 sees to it while the
// others go on; at its end all help.
template <typename Config>
template <typename T>
__device__ void DecodeKernel<Config>::leave_partial(DecodeCursor const& c, bool more) {
    if (more && warp != 0) return;
    int const first = shared.pieces.of(c.begin), last = shared.pieces.of(c.begin + c.num_tiles - 1);
    if (warp == 0) {
        int others = 0;
        if (lane == 0) {
            if constexpr (!Config::kFew) __threadfence();  // the barrier has brought the other warps' writes before it
            int* const counter = counters + c.sequence * p.pool.num_kv_heads + kv_head;
            others = Config::kFew ? count_in_order(counter) : atomicAdd(counter, 1);
            if (others == last - first) *counter = 0;  // for the next launch
            if constexpr (!Config::kFew) __threadfence();
            shared.is_last = others == last - first;
        }
        __syncwarp();
    }
    if (!more) __syncthreads();
    if (!shared.is_last) return;
    if (Config::kFew && !more) {
        combine_at_end<T>(c, first, last);
    } else {
        combine<T>(c, first, last, warp, more ? 1 : Config::kWarps);
    }
}

// Add the four warps' sums. Warp w then holds dims 2w and 2w + 1 of each word in out[.][.][0], and all hold max and
// sum.
template <typename Config>
__device__ void DecodeKernel<Config>::merge_warps(float* scratch) {
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
    float shrink[Config::kQueryTiles][2];
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
            shrink[n][i] = exp2_fast(query_max[n][i] - top);
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
                    out[n][j][m][i] = (out[n][j][m][i] * unit + query_lo[n][i % 2]) * shrink[n][i % 2];
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
__device__ float DecodeKernel<Config>::normalizer(int query_head, float max, float sum) const {
    if (p.sinks == nullptr) return __fdividef(1.0f, sum);
    float const sink = p.sinks[query_head] * kLog2e;
    float const top = fmaxf(max, sink);
    float const shrink = exp2_fast(max - top);
    return shrink / (sum * shrink + exp2_fast(sink - top));
}

// After merge_warps, for a sequence that this CTA has whole.
template <typename Config>
template <typename T>
__device__ void DecodeKernel<Config>::write_output() {
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
__device__ void DecodeKernel<Config>::write_partial(float* partial) {
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

// Add up the partial sums of a sequence's pieces, in an order that does not depend on who was last. One of `workers`
// warps.
template <typename Config>
template <typename T>
__device__ void DecodeKernel<Config>::combine(DecodeCursor const& c, int first_piece, int last_piece, int worker,
                                              int workers) const {
    size_t const stride = 2 * p.pool.num_kv_heads * decode_partial_floats(group, Config::kHeadDim);
    float const* const base = partials + (size_t(first_piece) * p.pool.num_kv_heads + kv_head) * 2 *
                                             decode_partial_floats(group, Config::kHeadDim);
    // The first may have begun in an earlier sequence; then this one's is its second.
    float const* const head =
        base + (shared.pieces.begin(first_piece) < c.begin ? decode_partial_floats(group, Config::kHeadDim) : 0);
    int const count = last_piece - first_piece + 1;
    T* const rows = static_cast<T*>(p.out) + (size_t(c.sequence) * p.num_heads + kv_head * group) * Config::kHeadDim;
    for (int x = (worker * 32 + lane) * 4; x < group * Config::kHeadDim; x += workers * 128) {
        int const query = x / Config::kHeadDim, max_at = group * Config::kHeadDim + query;
        DecodeSum total;
#pragma unroll(Config::kHeadDim > 128 ? 8 : 16)  // as registers allow
        for (int i = 0; i < count; ++i) {
            float const* const partial = i == 0 ? head : base + i * stride;
            float4 const o = __ldcg(reinterpret_cast<float4 const*>(partial + x));
            float const max = __ldcg(partial + max_at), mass = __ldcg(partial + max_at + group);
            total.raise(fmaxf(total.max, max));
            total.add(o, max, mass);
        }
        float const scale = normalizer(kv_head * group + query, total.max, total.sum);
        T const four[4] = {from_float<T>(total.out.x * scale), from_float<T>(total.out.y * scale),
                           from_float<T>(total.out.z * scale), from_float<T>(total.out.w * scale)};
        *reinterpret_cast<uint2*>(rows + x) = *reinterpret_cast<uint2 const*>(four);
    }
}

// The same at the end of a piece, where all warps wait for it: all loads of a round are begun before the first is
// needed.
template <typename Config>
template <typename T>
__device__ void DecodeKernel<Config>::combine_at_end(DecodeCursor const& c, int first_piece, int last_piece) const {
    size_t const size = decode_partial_floats(group, Config::kHeadDim);
    float const* const base = partials + (size_t(first_piece) * p.pool.num_kv_heads + kv_head) * 2 * size;
    float const* const head = base + (shared.pieces.begin(first_piece) < c.begin ? size : 0);
    int const count = last_piece - first_piece + 1;
    T* const rows = static_cast<T*>(p.out) + (size_t(c.sequence) * p.num_heads + kv_head * group) * Config::kHeadDim;
    constexpr int kAtOnce = Config::kHeadDim > 128 ? 4 : Config::kCtasPerSm > 3 ? 8 : 16;  // as registers allow
    for (int x = threadIdx.x * 4; x < group * Config::kHeadDim; x += Config::kThreads * 4) {
        int const query = x / Config::kHeadDim, max_at = group * Config::kHeadDim + query;
        DecodeSum total;
        for (int first = 0; first < count; first += kAtOnce) {
            float4 out[kAtOnce];
            float max[kAtOnce], sum[kAtOnce];
#pragma unroll
            for (int u = 0; u < kAtOnce; ++u) {
                int const i = first + u;
                float const* const partial = i == 0 ? head : base + i * 2 * p.pool.num_kv_heads * size;
                bool const exists = i < count;
                out[u] = exists ? __ldcg(reinterpret_cast<float4 const*>(partial + x)) : float4{0.0f, 0.0f, 0.0f, 0.0f};
                max[u] = exists ? __ldcg(partial + max_at) : kNoMax;
                sum[u] = exists ? __ldcg(partial + max_at + group) : 0.0f;
            }
            float higher = total.max;
#pragma unroll
            for (int u = 0; u < kAtOnce; ++u) higher = fmaxf(higher, max[u]);
            total.raise(higher);
#pragma unroll
            for (int u = 0; u < kAtOnce; ++u) total.add(out[u], max[u], sum[u]);
        }
        float const scale = normalizer(kv_head * group + query, total.max, total.sum);
        T const four[4] = {from_float<T>(total.out.x * scale), from_float<T>(total.out.y * scale),
                           from_float<T>(total.out.z * scale), from_float<T>(total.out.w * scale)};
        *reinterpret_cast<uint2*>(rows + x) = *reinterpret_cast<uint2 const*>(four);
    }
}

}  // namespace saw
