// Prefill: the consumer warps.
// A part of pipeline_sm90.cuh, which includes it.
#pragma once

#include "saw/common/vec.cuh"
#include "saw/paged_attention/prefill/pipeline_sm90.cuh"

namespace saw {

constexpr int kTurnBarrier = 1;   // and 2: a consumer group's turn at the tensor cores
constexpr int kGroupBarrier = 3;  // and 4: a consumer group by itself

template <typename Config>
__device__ void PrefillSm90Kernel<Config>::consume() {
    using HistoryType = typename Config::HistoryType;
    // Said to be one number in a warp, so that the products' places are counted in uniform registers.
    int const warpgroup = __shfl_sync(~0u, threadIdx.x / 128 - 1, 0);
    int const row = warpgroup * 64 + threadIdx.x % 128 / 32 * 16 + lane / 4;
    float const score_scale = p.softmax_scale * kLog2e;
    if (warpgroup == 1) named_barrier_arrive(kTurnBarrier, 256);
    if (tile.sequence >= 0) load_queries(warpgroup, tile, kv_head);
    for (int index = blockIdx.x; tile.sequence >= 0;) {
        rows.begin(tile, row, group);
        index += gridDim.x;
        PrefillTile const next = find_tile(index);
        int const next_head = index % p.pool.num_kv_heads;
        copy_async_wait();
        fence_bulk_copy();
        named_barrier_sync(kGroupBarrier + warpgroup, 128);
        bool const history = tile.past.count() > 0;
        attend<T>(tile.own, true, warpgroup, score_scale, !history, next, next_head);
        if (history) {
            float scale = score_scale;
            if constexpr (Config::kConvertsQueries) convert_queries(warpgroup);
            if constexpr (Config::kOrdersOutputs) order_outputs<true>();
            if constexpr (Config::kCodes) scale *= kQueryUnit;
            attend<HistoryType>(tile.past, false, warpgroup, scale, true, next, next_head);
            if constexpr (Config::kOrdersOutputs) order_outputs<false>();
        }
        rows.template write<T>(out, p, tile, kv_head, group, row);
        tile = next;
        kv_head = next_head;
    }
    if (warpgroup == 0) named_barrier_sync(kTurnBarrier, 256);
}

// The group's 64 rows of a tile's queries; rows without a query become zeros.
template <typename Config>
__device__ void PrefillSm90Kernel<Config>::load_queries(int warpgroup, PrefillTile const& of, int head) const {
    constexpr int kChunks = Config::kHeadDim / 8;
    int const thread = threadIdx.x % 128;
    auto const* const q = static_cast<T const*>(p.q);
    uint32_t const target = shared_address(shared.queries);
#pragma unroll 4
    for (int i = 0; i < 64 * kChunks / 128; ++i) {
        int const at = i * 128 + thread;
        int const row = warpgroup * 64 + at / kChunks, c = at % kChunks;
        int const query = of.begin + row / group;
        bool const exists = query < of.end && row < Config::kRows / group * group;
        size_t const source = size_t(of.first_token + query) * p.num_heads + head * group + row % group;
        copy_async(target + (c / 8) * Config::kQueryBoxBytes + row * 128 + ((c ^ row) % 8) * 16,
                   q + (exists ? source * Config::kHeadDim + c * 8 : 0), exists ? 16 : 0);
    }
}

// Q as a history of codes wants it, in place: fp16, and its channels in the order of the dequantized keys'.
template <typename Config>
__device__ void PrefillSm90Kernel<Config>::convert_queries(int warpgroup) const {
    constexpr int kChunks = Config::kBoxes * 8;
    named_barrier_sync(kGroupBarrier + warpgroup, 128);  // the whole group has left Q as it was
#pragma unroll 2
    for (int i = 0; i < 64 * kChunks / 128; ++i) {
        int const at = i * 128 + threadIdx.x % 128;
        uint8_t* const chunk =
            shared.queries + at / (64 * 8) * Config::kQueryBoxBytes + warpgroup * 64 * 128 + at % (64 * 8) * 16;
        uint4 eight = *reinterpret_cast<uint4 const*>(chunk);
        if constexpr (std::is_same_v<T, __nv_bfloat16>) {
            for (uint32_t* pair : {&eight.x, &eight.y, &eight.z, &eight.w}) {
                float2 const x = __bfloat1622float2(reinterpret_cast<__nv_bfloat162 const&>(*pair));
                *pair = pack_half2(x.x * (1.0f / kQueryUnit), x.y * (1.0f / kQueryUnit));
            }
        }
        *reinterpret_cast<uint4*>(chunk) = Config::kKeyOrder == CodeOrder::kInterleaved ? interleave(eight) : eight;
    }
    fence_bulk_copy();
    named_barrier_sync(kGroupBarrier + warpgroup, 128);
}

// The outputs' channels from their own order to that of the dequantized values', or back: lane t of each four holds two
// of eight channels, 2t and 2t + 1 or t and t + 4.
template <typename Config>
template <bool Interleaved>
__device__ void PrefillSm90Kernel<Config>::order_outputs() {
    int const t = threadIdx.x % 4;
    int const from[2] = {Interleaved ? t / 2 : 2 * t % 4, Interleaved ? t / 2 + 2 : 2 * t % 4 + 1};
    bool const second = Interleaved ? t % 2 : t / 2;
#pragma unroll
    for (int i = 0; i < Config::kOutputs; i += 2) {
        float both[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            float const first = __shfl_sync(~0u, out[i], from[k], 4), other = __shfl_sync(~0u, out[i + 1], from[k], 4);
            both[k] = second ? other : first;
        }
        // One pair at a time: there are no registers for more.
        asm volatile("" : "+f"(both[0]), "+f"(both[1])::"memory");
        out[i] = both[0];
        out[i + 1] = both[1];
    }
}

// S = Q K^T of a group's rows and a tile.
template <typename Config>
template <typename U>
__device__ void PrefillSm90Kernel<Config>::score(float (&s)[Config::kScores], uint32_t queries, uint32_t keys) const {
    uint64_t const a = swizzled_operand(queries, 1024, 16), b = swizzled_operand(keys, 1024, 16);
#pragma unroll
    for (int k = 0; k < Config::kHeadDim / 16; ++k)
        Wgmma<U, Config::kTileTokens>::shared(s, later_operand(a, k / 4 * Config::kQueryBoxBytes + k % 4 * 32),
                                              later_operand(b, k / 4 * Config::kTileBoxBytes + k % 4 * 32), k > 0);
}

// O += P V.
template <typename Config>
template <typename U>
__device__ void PrefillSm90Kernel<Config>::weigh(float (&o)[Config::kOutputs],
                                                 uint32_t const (&prob)[Config::kScores / 2], uint32_t values) const {
    uint64_t const b = swizzled_operand(values, 1024, Config::kTileBoxBytes);
#pragma unroll
    for (int k = 0; k < Config::kTileTokens / 16; ++k)
        Wgmma<U, Config::kHeadDim>::registers(o, prob + 4 * k, later_operand(b, k * 16 * 128), true);
}

// One kind of tiles, from the last down. If they are the tile's last, the next tile's queries take the place of its own
// as soon as they are not needed any more.
template <typename Config>
template <typename U>
__device__ void PrefillSm90Kernel<Config>::attend(KeyTiles tiles, bool chunk, int warpgroup, float score_scale,
                                                  bool last, PrefillTile const& next, int next_head) {
    uint32_t const queries = shared_address(shared.queries) + warpgroup * 64 * 128;
    float s[Config::kScores];
    uint32_t prob[Config::kScores / 2];
    float keep[2] = {1.0f, 1.0f};
    auto const pack = [&] {
#pragma unroll
        for (int i = 0; i < Config::kScores / 2; ++i) prob[i] = pack_pair<U>(s[2 * i], s[2 * i + 1]);
    };
    auto const masked = [&](int index) {
        int const first = index * Config::kTileTokens;
        return tile.hides(first, first + Config::kTileTokens, chunk, p.window);
    };
    auto const rescale = [&] {
        if (__any_sync(~0u, keep[0] != 1.0f || keep[1] != 1.0f)) {
#pragma unroll
            for (int i = 0; i < Config::kOutputs; ++i) out[i] *= keep[i / 2 % 2];
        }
    };

    mbarrier_wait(&shared.full[ring.slot], ring.parity);
    wgmma_fence();
    score<U>(s, queries, shared_address(shared.slots[ring.slot]));
    wgmma_commit();
    wgmma_wait<0>();
    hold(s);
    release(ring.slot);
    ring.template advance<Config>();
    if (p.softcap > 0.0f) cap_scores(s, p.softcap, score_scale);
    if (masked(tiles.last)) rows.mask(s, tile, tiles.last * Config::kTileTokens, chunk, p.window);
    rows.soften(s, score_scale, keep);
    pack();
    if (chunk) {
#pragma unroll
        for (int i = 0; i < Config::kOutputs; ++i) out[i] = 0.0f;
    } else {
        rescale();
    }

#pragma unroll 1
    for (int index = tiles.last - 1; index >= tiles.first; --index) {
        int const key_slot = ring.slot;
        mbarrier_wait(&shared.full[ring.slot], ring.parity);
        ring.template advance<Config>();
        int const value_slot = ring.slot;
        named_barrier_sync(kTurnBarrier + warpgroup, 256);
        hold(out);
        wgmma_fence();
        score<U>(s, queries, shared_address(shared.slots[key_slot]));
        wgmma_commit();
        mbarrier_wait(&shared.full[ring.slot], ring.parity);
        wgmma_fence();
        weigh<U>(out, prob, shared_address(shared.slots[value_slot]));
        wgmma_commit();
        named_barrier_arrive(kTurnBarrier + 1 - warpgroup, 256);
        wgmma_wait<1>();
        hold(s);
        release(key_slot);
        if (p.softcap > 0.0f) cap_scores(s, p.softcap, score_scale);
        if (masked(index)) rows.mask(s, tile, index * Config::kTileTokens, chunk, p.window);
        rows.soften(s, score_scale, keep);
        // The softmax belongs before the wait for P V, beside which it is computed, and the assembler does not move it
        // across a loop: so wait here already for the tile that is wanted next.
        hold(s);
        ring.template advance<Config>();
        mbarrier_wait(&shared.full[ring.slot], ring.parity);
        wgmma_wait<0>();
        hold(out);
        hold(s);  // P stays what it is until its product is done
        release(value_slot);
        pack();
        rescale();
    }

    mbarrier_wait(&shared.full[ring.slot], ring.parity);
    hold(out);
    wgmma_fence();
    weigh<U>(out, prob, shared_address(shared.slots[ring.slot]));
    wgmma_commit();
    if (last && next.sequence >= 0) {
        named_barrier_sync(kGroupBarrier + warpgroup, 128);  // all of the group's scores are computed
        load_queries(warpgroup, next, next_head);
    }
    wgmma_wait<0>();
    hold(out);
    release(ring.slot);
    ring.template advance<Config>();
}

}  // namespace saw
