// What the choice of a token is made of: a row of logits shared by a cluster of CTAs, and probabilities in fixed point.
#pragma once

#include <cooperative_groups.h>

#include "saw/sample/params.h"

namespace saw {

struct SampleConfig {
    static constexpr int kThreads = 512;
    static constexpr int kWarps = kThreads / 32;
    static constexpr int kMaxCluster = 8;
    static constexpr int kBins = 2048;
    static constexpr int kBinsPerThread = kBins / kThreads;
    static constexpr int kLoads = 6;                // that a thread has under way, of four logits each
    static constexpr int kStride = 4 * 32;          // logits of a warp's load
    static constexpr int kSpan = kLoads * kStride;  // logits of a warp's loads
    static constexpr int kMassBits = 45;            // the mass of the likeliest token is 1 << kMassBits
    static constexpr float kNats = 32;              // whatever is less likely by exp(-32) has no mass
    static constexpr int kPowers = 64;              // of two, from 1 to below 2
    static constexpr int kMaxSpans = (kMaxVocab / kWarps + kSpan - 1) / kSpan;  // of a warp's run
    static_assert(kMaxSpans <= 32, "a warp looks at all spans of its run at once");
    static_assert(kBinsPerThread == 4, "a thread reads its bins at once");
    static_assert((uint64_t(kMaxVocab) << kMassBits) >> kMassBits == kMaxVocab, "the mass of a row must not overflow");
};

struct SampleShared {
    uint32_t count[SampleConfig::kBins];
    uint32_t low[SampleConfig::kBins];  // masses in two words: shared memory adds no more than 32 bits at once
    uint32_t high[SampleConfig::kBins];
    double powers[SampleConfig::kPowers];
    uint64_t of_warps[2][2][SampleConfig::kWarps];  // read by the cluster, in turn
    uint64_t scanned[2][SampleConfig::kWarps];
    uint64_t spans[SampleConfig::kWarps][SampleConfig::kMaxSpans];
    uint64_t picked[5];
    double uniform;
    int token;
};

// Unsigned integers in the order of the floats.
__device__ inline uint32_t ordered_bits(float x) {
    uint32_t const bits = __float_as_uint(x);
    return bits ^ (bits >> 31 ? 0xffffffff : 0x80000000);
}

__device__ inline float from_ordered_bits(uint32_t bits) {
    return __uint_as_float(bits ^ (bits >> 31 ? 0x80000000 : 0xffffffff));
}

__device__ inline void fill_powers(double* powers) {
    if (threadIdx.x < SampleConfig::kPowers) powers[threadIdx.x] = exp2(double(threadIdx.x) / SampleConfig::kPowers);
}

// exp((logit - top) / temperature), to within 2^-46 of the likeliest token's.
struct Weight {
    static constexpr double kLn2 = 0.69314718055994530942;

    double top, scale;
    double const* powers;

    // A scale of infinity would make the top's own weight NaN.
    __device__ Weight(double top, double temperature, double const* powers)
        : top(top), scale(fmin(SampleConfig::kPowers / kLn2 / temperature, 1e300)), powers(powers) {}

    // 0 for NaN.
    __device__ uint64_t operator()(float logit) const {
        constexpr double kWhole = 0x1.8p52, kUnit = 0x1p52;
        constexpr double kLeast = -double(SampleConfig::kMassBits + 2) * SampleConfig::kPowers;
        double power = (double(logit) - top) * scale;
        power = power > kLeast ? power : kLeast;  // which is rounded to 0
        double const shifted = power + kWhole;
        int const whole = __double2loint(shifted);
        double const r = (power - (shifted - kWhole)) * (kLn2 / SampleConfig::kPowers);
        double const series = fma(r, fma(r, fma(r, fma(r, fma(r, 1.0 / 120, 1.0 / 24), 1.0 / 6), 0.5), 1.0), 1.0);
        double const value = powers[whole & (SampleConfig::kPowers - 1)] * series;
        int const exponent = (whole >> 6) + SampleConfig::kMassBits;
        double const scaled = __hiloint2double(__double2hiint(value) + exponent * (1 << 20), __double2loint(value));
        return uint64_t(__double_as_longlong(scaled + kUnit)) & 0xfffffffffffff;
    }
    static_assert(SampleConfig::kPowers == 1 << 6);
};

// The CTAs that share a row: one before Hopper.
class SampleCluster {
  public:
#if __CUDA_ARCH__ >= 900
    __device__ int size() const { return int(cooperative_groups::this_cluster().num_blocks()); }
    __device__ int rank() const { return int(cooperative_groups::this_cluster().block_rank()); }
    __device__ void sync() const { cooperative_groups::this_cluster().sync(); }
    template <typename T>
    __device__ T* of(int rank, T* shared) const {
        return cooperative_groups::this_cluster().map_shared_rank(shared, rank);
    }
#else
    __device__ int size() const { return 1; }
    __device__ int rank() const { return 0; }
    __device__ void sync() const { __syncthreads(); }
    template <typename T>
    __device__ T* of(int, T* shared) const {
        return shared;
    }
#endif
};

// A warp's run of a row. The runs lie in the order of the cluster's warps.
template <bool Vector>
class SampleRun {
  public:
    __device__ SampleRun(float const* logits, uint32_t const* mask, int vocab_size, int warp, int warps)
        : logits_(logits), mask_(mask) {
        constexpr int kStride = SampleConfig::kStride;
        int const length = ((vocab_size + warps - 1) / warps + kStride - 1) / kStride * kStride;
        begin_ = min(warp * length, vocab_size);
        end_ = min(begin_ + length, vocab_size);
    }

    // f(logit, token) for the lane's tokens, in ascending order; logits of no token are NaN, and no others.
    template <typename F>
    __device__ void each(F const& f) const {
        for (int base = begin_; base < end_; base += SampleConfig::kSpan) each_of_span(base, f);
    }

    // f(logits, token) for four of the lane's tokens at once, in ascending order.
    template <typename F>
    __device__ void each_group(F const& f) const {
        for (int base = begin_; base < end_; base += SampleConfig::kSpan) span(base, f);
    }

    template <typename F>
    __device__ void each_of_span(int base, F const& f) const {
        span(base, [&](float const(&logits)[4], int token) {
#pragma unroll
            for (int i = 0; i < 4; ++i) f(logits[i], token + i);
        });
    }

    template <typename F>
    __device__ void span(int base, F const& f) const {
        constexpr int kLoads = SampleConfig::kLoads, kStride = SampleConfig::kStride;
        int const first = base + int(threadIdx.x % 32) * 4;
        float logits[kLoads][4];
#pragma unroll
        for (int u = 0; u < kLoads; ++u) load(first + u * kStride, logits[u]);
        if (mask_ != nullptr) {
#pragma unroll
            for (int u = 0; u < kLoads; ++u) apply_mask(first + u * kStride, logits[u]);
        }
#pragma unroll
        for (int u = 0; u < kLoads; ++u) f(logits[u], first + u * kStride);
    }

    // From now on all tokens are there.
    __device__ void unmask() { mask_ = nullptr; }

    __device__ int begin() const { return begin_; }
    __device__ int end() const { return end_; }

  private:
    // NaN is minus infinity, and there is but one zero.
    __device__ static float clean(float x) { return fmaxf(x, -INFINITY) + 0.0f; }

    // Past the first-level cache, which does not see what other CTAs write.
    __device__ void load(int token, float (&logits)[4]) const {
        if constexpr (Vector) {
            float4 x = make_float4(NAN, NAN, NAN, NAN);
            bool const is = token < end_;
            if (is) x = __ldcg(reinterpret_cast<float4 const*>(logits_ + token));
            logits[0] = is ? clean(x.x) : NAN;
            logits[1] = is ? clean(x.y) : NAN;
            logits[2] = is ? clean(x.z) : NAN;
            logits[3] = is ? clean(x.w) : NAN;
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) logits[i] = token + i < end_ ? clean(__ldcg(logits_ + token + i)) : NAN;
        }
    }

    // Of four tokens that lie in one word, since a run and all its loads begin at multiples of four.
    __device__ void apply_mask(int token, float (&logits)[4]) const {
        if (token >= end_) return;
        uint32_t const bits = mask_[token / 32] >> (token % 32);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (!(bits >> i & 1) && logits[i] == logits[i]) logits[i] = -INFINITY;
        }
    }

    float const* logits_;
    uint32_t const* mask_;
    int begin_, end_;
};

struct Plus {
    __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a + b; }
};

struct Larger {
    __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a > b ? a : b; }
};

template <typename Combine>
__device__ uint64_t reduce_warp(uint64_t value, Combine const& combine) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) value = combine(value, __shfl_xor_sync(~0u, value, step));
    return value;
}

// Sum over the lane's own and all lower lanes.
__device__ inline uint64_t scan_warp(uint64_t value) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        uint64_t const lower = __shfl_up_sync(~0u, value, step);
        if (threadIdx.x % 32 >= step) value += lower;
    }
    return value;
}

}  // namespace saw
