// The choice of each row's next token, without sorting the vocabulary.
//
// A cluster of CTAs works on one row. Probabilities are summed in fixed point, so that the order of the sums, and with
// it the size of the cluster, changes nothing: a row's choice is the same in any batch. A place in the order
// of likelihood is found by histograms of counts and masses: the first over bins of equal width in the logit, the next
// over ever narrower ranges of the floats' bits, until one value is left. Equals fall by token.
#pragma once

#include "saw/sample/philox.h"
#include "saw/sample/row.cuh"

namespace saw {

template <bool Vector>
class RowSampler {
    using Config = SampleConfig;
    static constexpr int kBinsPerThread = Config::kBinsPerThread;

    enum class By { kCount, kMass };

    struct Amount {
        uint64_t count, mass;
        __device__ uint64_t get(By by) const { return by == By::kMass ? mass : count; }
    };

    // A histogram over the whole row: the thread's own bins, and what lies before the first of them.
    struct Bins {
        Amount own[kBinsPerThread];
        Amount before;
    };

    struct Picked {
        int bin;
        Amount before, inside;
    };

    // Logits, by their ordered bits, ends included.
    struct Range {
        uint32_t low, high;
    };

    // What a histogram is of: all logits in bins of equal width, or a range of their bits in bins of 1 << shift.
    struct AllBins {};
    struct NarrowBins {
        Range range;
        int shift;
    };

    // A token in the order of likelihood: number `rank` of the equal ones in a range, and the mass up to its end.
    struct Place {
        Range range;
        uint64_t rank, mass;
    };

  public:
    __device__ RowSampler(SampleParams const& params, int row, SampleShared& shared)
        : params_(params),
          row_(row),
          want_(params.rows[row]),
          shared_(shared),
          logits_(params.logits + size_t(params.row_ends ? params.row_ends[row] - 1 : row) * params.vocab_size),
          run_(logits_, want_.mask, params.vocab_size, warp_of_row(), warps_of_row()) {}

    __device__ void sample() {
        if (want_.draw == Draw::kNothing) {
            if (is_first()) params_.tokens[row_] = -1;
            return;
        }
        if (want_.draw != Draw::kGreedy || want_.num_logprobs > 0) fill_powers(shared_.powers);
        if (want_.draw != Draw::kGreedy && threadIdx.x == Config::kThreads - 1)
            shared_.uniform = philox_uniform(want_.seed, want_.index);
        if (want_.num_listed > 0) {
            change_listed();
            cluster_.sync();
        }
        find_top();
        int token = top_token_;
        // Without a finite top there are no probabilities, and any token must do.
        if (want_.draw != Draw::kGreedy && fabsf(top_) < INFINITY)
            token = want_.draw == Draw::kByToken ? draw_by_token() : draw_by_likelihood();
        if (is_first()) params_.tokens[row_] = token;
        cluster_.sync();
        if (want_.num_listed > 0) {
            restore_listed();
            cluster_.sync();
        }
        if (want_.num_logprobs == 0) return;
        if (want_.num_listed > 0 || want_.mask != nullptr) {
            run_.unmask();
            find_top();
        }
        write_logprobs(token);
    }

  private:
    __device__ static int lane() { return threadIdx.x % 32; }
    __device__ static int warp() { return threadIdx.x / 32; }
    __device__ int warp_of_row() const { return cluster_.rank() * Config::kWarps + warp(); }
    __device__ int warps_of_row() const { return cluster_.size() * Config::kWarps; }
    __device__ bool is_first() const { return cluster_.rank() == 0 && threadIdx.x == 0; }

    template <typename F>
    __device__ void each_listed(F const& f) const {
        int const threads = cluster_.size() * Config::kThreads;
        for (int i = cluster_.rank() * Config::kThreads + threadIdx.x; i < want_.num_listed; i += threads)
            f(want_.listed[i]);
    }

    // In double precision and step by step, as the CPU does it, and rounded once.
    __device__ void change_listed() const {
        each_listed([&](ListedToken& listed) {
            float const logit = logits_[listed.token];
            listed.logit = logit;
            double const penalty = want_.repetition_penalty;
            double value = __dadd_rn(double(logit), double(listed.bias));
            if (penalty != 1 && listed.count != kUnseen)
                value = value > 0 ? value / penalty : __dmul_rn(value, penalty);
            if (listed.count > 0) {
                double const times = __dmul_rn(want_.frequency_penalty, double(listed.count));
                value = __dsub_rn(value, __dadd_rn(want_.presence_penalty, times));
            }
            logits_[listed.token] = listed.count == kBanned ? -INFINITY : float(value);
        });
    }

    __device__ void restore_listed() const {
        each_listed([&](ListedToken const& listed) { logits_[listed.token] = listed.logit; });
    }

    // All threads of the cluster get what the values of all combine to. 0 must not change what it is combined with.
    template <typename Combine>
    __device__ void over_row(uint64_t& first, uint64_t& second, Combine const& combine) {
        uint64_t* const values[] = {&first, &second};
        turn_ ^= 1;
        for (int k = 0; k < 2; ++k) {
            uint64_t const value = reduce_warp(*values[k], combine);
            if (lane() == 0) shared_.of_warps[turn_][k][warp()] = value;
        }
        cluster_.sync();
        for (int k = 0; k < 2; ++k) {
            uint64_t value = 0;
            for (int i = lane(); i < warps_of_row(); i += 32) value = combine(value, of_warp(k, i));
            *values[k] = reduce_warp(value, combine);
        }
    }

    // Nobody writes there again before all have come to the next turn's barrier.
    __device__ uint64_t of_warp(int k, int warp_of_row) const {
        uint64_t* const own = &shared_.of_warps[turn_][k][warp_of_row % Config::kWarps];
        return *cluster_.of(warp_of_row / Config::kWarps, own);
    }

    // The largest logit, the first token that has it, and the least finite logit.
    __device__ void find_top() {
        float top = -INFINITY, least = INFINITY;
        int token = 0;
        run_.each([&](float logit, int i) {
            if (logit > top) {
                top = logit;
                token = i;
            }
            if (logit > -INFINITY) least = fminf(least, logit);
        });
        uint64_t best = uint64_t(ordered_bits(top)) << 32 | uint32_t(~token), worst = uint32_t(~ordered_bits(least));
        over_row(best, worst, Larger{});
        top_ = from_ordered_bits(uint32_t(best >> 32));
        top_token_ = int(~uint32_t(best));
        least_ = from_ordered_bits(~uint32_t(worst));
    }

    // The mass that a random number from 0 to below 1 points to: the first place where so much is reached is the
    // choice.
    __device__ uint64_t target(uint64_t mass) const {
        uint64_t const before = uint64_t(shared_.uniform * double(mass));
        return before < mass ? before + 1 : mass;
    }

    __device__ int draw_by_token() {
        Weight const weight(top_, want_.temperature, shared_.powers);
        auto const kept = [&weight, least = least_mass()](float logit) { return at_least(least, weight(logit)); };
        return nth(kept, [&](uint64_t total) { return target(total); });
    }

    // Of a token that min_p leaves.
    __device__ uint64_t least_mass() const { return uint64_t(ceil(ldexp(want_.min_p, Config::kMassBits))); }

    __device__ static uint64_t at_least(uint64_t least, uint64_t mass) { return mass < least ? 0 : mass; }

    // Of all tokens that min_p leaves; of equals it leaves all or none.
    __device__ uint64_t mass_at_least(Weight const& weight, uint64_t least) {
        uint64_t sum = 0, none = 0;
        run_.each([&](float logit, int) { sum += at_least(least, weight(logit)); });
        over_row(sum, none, Plus{});
        return sum;
    }

    __device__ int draw_by_likelihood() {
        float const range = fminf(top_ - least_, float(Config::kNats * want_.temperature));
        bin_scale_ = Config::kBins / fmaxf(range, 1e-30f);
        Weight const weight(top_, want_.temperature, shared_.powers);
        uint64_t total = 0;
        Bins const bins = histogram(weight, AllBins{}, total);
        if (want_.top_k > 0 && want_.top_k < params_.vocab_size)
            total = find(weight, bins, By::kCount, uint64_t(want_.top_k)).mass;
        if (want_.min_p > 0) total = min(total, mass_at_least(weight, least_mass()));
        if (want_.top_p < 1) {
            double const share = ceil(want_.top_p * double(total));
            total = find(weight, bins, By::kMass, min(max(uint64_t(share), uint64_t(1)), total)).mass;
        }
        Place const place = find(weight, bins, By::kMass, target(total));
        float const low = from_ordered_bits(place.range.low), high = from_ordered_bits(place.range.high);
        auto const is_in = [&](float logit) { return uint64_t(low <= logit && logit <= high); };
        return nth(is_in, [&](uint64_t) { return place.rank + 1; });
    }

    // Falls with the logit.
    __device__ int bin_of(float logit) const {
        return min(__float2int_rz((top_ - logit) * bin_scale_), Config::kBins - 1);
    }

    // The least logit, by its bits, that is not below the bin. bin_of rounds by less than the margin.
    __device__ uint32_t least_of(int bin) const {
        constexpr double kMargin = 1e-6;
        double const distance = (bin + 1) / double(bin_scale_);
        uint32_t outside = ordered_bits(__double2float_rd(double(top_) - distance * (1 + kMargin)));
        uint32_t inside = ordered_bits(fminf(__double2float_ru(double(top_) - distance * (1 - kMargin)), top_));
        while (inside - outside > 1) {
            uint32_t const middle = outside + (inside - outside) / 2;
            if (bin_of(from_ordered_bits(middle)) <= bin)
                inside = middle;
            else
                outside = middle;
        }
        return inside;
    }

    __device__ Range range_of(int bin) const {
        uint32_t const low = bin == Config::kBins - 1 ? ordered_bits(-INFINITY) : least_of(bin);
        return {low, bin == 0 ? ordered_bits(top_) : least_of(bin - 1) - 1};
    }

    // The first token in the order of likelihood with which so much is reached.
    __device__ Place find(Weight const& weight, Bins const& bins, By by, uint64_t amount) {
        Picked picked = pick(bins, {0, 0}, by, amount);
        Range range = range_of(picked.bin);
        while (picked.inside.count > 1 && range.low < range.high) {
            constexpr int kBits = 11;
            static_assert(Config::kBins == 1 << kBits);
            int const shift = max(0, 32 - __clz(int(range.high - range.low)) - kBits);
            uint64_t total;
            picked = pick(histogram(weight, NarrowBins{range, shift}, total), picked.before, by, amount);
            uint32_t const high = range.high - (uint32_t(picked.bin) << shift);
            range = {high - min(high - range.low, (uint32_t(1) << shift) - 1), high};
        }
        uint64_t const each = picked.inside.mass / picked.inside.count;
        uint64_t const past = amount - picked.before.get(by) - 1;
        uint64_t const rank = by == By::kMass ? past / each : past;
        return {range, rank, picked.before.mass + (rank + 1) * each};
    }

    // All logits by bin_of.
    __device__ void fill(Weight const& weight, AllBins) {
        run_.each_group([&](float const(&logits)[4], int) {
            uint64_t masses[4];  // together, since one by one each would wait for the last
#pragma unroll
            for (int i = 0; i < 4; ++i) masses[i] = weight(logits[i]);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (logits[i] == logits[i]) add(bin_of(logits[i]), masses[i]);
            }
        });
    }

    // The logits of a range, mostly few.
    __device__ void fill(Weight const& weight, NarrowBins const& bins) {
        float const low = from_ordered_bits(bins.range.low), high = from_ordered_bits(bins.range.high);
        run_.each([&](float logit, int) {
            if (low <= logit && logit <= high)
                add(int((bins.range.high - ordered_bits(logit)) >> bins.shift), weight(logit));
        });
    }

    // Counts and masses by bin. All threads of the cluster get the total.
    template <typename Filling>
    __device__ Bins histogram(Weight const& weight, Filling const& bins_of, uint64_t& total_mass) {
        int const t = threadIdx.x;
        uint4* const arrays[] = {reinterpret_cast<uint4*>(shared_.count), reinterpret_cast<uint4*>(shared_.low),
                                 reinterpret_cast<uint4*>(shared_.high)};
        for (uint4* const array : arrays) array[t] = make_uint4(0, 0, 0, 0);
        __syncthreads();
        fill(weight, bins_of);
        cluster_.sync();
        Bins bins{};
        for (int rank = 0; rank < cluster_.size(); ++rank) {
            uint4 const count = *cluster_.of(rank, arrays[0] + t), low = *cluster_.of(rank, arrays[1] + t),
                        high = *cluster_.of(rank, arrays[2] + t);
            uint32_t const counts[] = {count.x, count.y, count.z, count.w}, lows[] = {low.x, low.y, low.z, low.w},
                           highs[] = {high.x, high.y, high.z, high.w};
#pragma unroll
            for (int i = 0; i < kBinsPerThread; ++i) {
                bins.own[i].count += counts[i];
                bins.own[i].mass += uint64_t(highs[i]) << 32 | lows[i];
            }
        }
        cluster_.sync();
        scan(bins, total_mass);
        return bins;
    }

    __device__ void add(int bin, uint64_t mass) {
        atomicAdd(&shared_.count[bin], 1u);
        uint32_t const low = uint32_t(mass);
        uint32_t const carry = atomicAdd(&shared_.low[bin], low) > ~low;
        uint32_t const high = uint32_t(mass >> 32) + carry;
        if (high != 0) atomicAdd(&shared_.high[bin], high);
    }

    __device__ void scan(Bins& bins, uint64_t& total_mass) {
        Amount own{};
        for (Amount const& bin : bins.own) {
            own.count += bin.count;
            own.mass += bin.mass;
        }
        uint64_t const count = scan_warp(own.count), mass = scan_warp(own.mass);
        if (lane() == 31) {
            shared_.scanned[0][warp()] = count;
            shared_.scanned[1][warp()] = mass;
        }
        __syncthreads();
        bins.before = {count - own.count, mass - own.mass};
        total_mass = 0;
        for (int i = 0; i < Config::kWarps; ++i) {
            total_mass += shared_.scanned[1][i];
            if (i < warp()) {
                bins.before.count += shared_.scanned[0][i];
                bins.before.mass += shared_.scanned[1][i];
            }
        }
        __syncthreads();
    }

    // The first bin with which so much is reached, `before` being what lies before the histogram.
    __device__ Picked pick(Bins const& bins, Amount before, By by, uint64_t amount) {
        before.count += bins.before.count;
        before.mass += bins.before.mass;
#pragma unroll
        for (int i = 0; i < kBinsPerThread; ++i) {
            Amount const& own = bins.own[i];
            if (before.get(by) < amount && amount <= before.get(by) + own.get(by)) {
                uint64_t const found[] = {uint64_t(threadIdx.x * kBinsPerThread + i), before.count, before.mass,
                                          own.count, own.mass};
                for (int j = 0; j < 5; ++j) shared_.picked[j] = found[j];
            }
            before.count += own.count;
            before.mass += own.mass;
        }
        __syncthreads();
        uint64_t const* const found = shared_.picked;
        Picked const picked{int(found[0]), {found[1], found[2]}, {found[3], found[4]}};
        __syncthreads();
        return picked;
    }

    // The first token, in the order of tokens, with which weigh()'s sum reaches target(the sum over the row).
    template <typename Weigh, typename Target>
    __device__ int nth(Weigh const& weigh, Target const& target) {
        uint64_t sum = 0;
        for (int base = run_.begin(), i = 0; base < run_.end(); base += Config::kSpan, ++i) {
            uint64_t of_span = 0;
            run_.each_of_span(base, [&](float logit, int) { of_span += weigh(logit); });
            of_span = reduce_warp(of_span, Plus{});
            if (lane() == 0) shared_.spans[warp()][i] = of_span;
            sum += of_span;
        }
        turn_ ^= 1;
        if (lane() == 0) shared_.of_warps[turn_][0][warp()] = sum;
        cluster_.sync();
        uint64_t before = 0, total = 0;
        for (int i = lane(); i < warps_of_row(); i += 32) {
            uint64_t const other = of_warp(0, i);
            total += other;
            if (i < warp_of_row()) before += other;
        }
        before = reduce_warp(before, Plus{});
        uint64_t const amount = target(reduce_warp(total, Plus{}));
        if (before < amount && amount <= before + sum) write_nth(weigh, before, amount);
        cluster_.sync();
        return *cluster_.of(0, &shared_.token);
    }

    // By the warp in whose run the token lies.
    template <typename Weigh>
    __device__ void write_nth(Weigh const& weigh, uint64_t before, uint64_t amount) {
        int const base = run_.begin() + lane() * Config::kSpan;
        uint64_t const own = base < run_.end() ? shared_.spans[warp()][lane()] : 0;
        uint64_t const upto = before + scan_warp(own);
        int const there = __ffs(__ballot_sync(~0u, upto >= amount)) - 1;
        uint64_t reached = __shfl_sync(~0u, upto - own, there);
        run_.span(__shfl_sync(~0u, base, there), [&](float const(&logits)[4], int token) {
            uint64_t weights[4], sum = 0;
#pragma unroll
            for (int i = 0; i < 4; ++i) sum += weights[i] = weigh(logits[i]);
            uint64_t const scanned = scan_warp(sum);
            uint64_t start = reached + scanned - sum;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (start < amount && amount <= start + weights[i]) *cluster_.of(0, &shared_.token) = token + i;
                start += weights[i];
            }
            reached += __shfl_sync(~0u, scanned, 31);
        });
    }

    // Of the logits as they came.
    __device__ void write_logprobs(int token) {
        Weight const weight(top_, 1.0, shared_.powers);
        uint64_t sum = 0, none = 0;
        run_.each([&](float logit, int) { sum += weight(logit); });
        over_row(sum, none, Plus{});
        double const log_total = log(double(sum) * exp2(-double(Config::kMassBits)));
        if (is_first()) params_.logprobs[row_] = (double(__ldcg(logits_ + token)) - double(top_)) - log_total;
        if (want_.num_logprobs > 1) write_likeliest(log_total);
        cluster_.sync();  // nobody leaves while it may be read
    }

    // Each pass finds the largest logit below the last one's, the first token of equals: few are wanted, as a rule.
    __device__ void write_likeliest(double log_total) {
        int const count = min(min(want_.num_logprobs - 1, params_.max_top), params_.vocab_size);
        size_t const first = size_t(row_) * params_.max_top;
        uint64_t last = ~uint64_t(0);
        for (int k = 0; k < count; ++k) {
            uint64_t best = 0, none = 0;
            run_.each([&](float logit, int i) {
                uint64_t const place = uint64_t(ordered_bits(logit)) << 32 | uint32_t(~i);
                if (logit == logit && place < last) best = max(best, place);
            });
            over_row(best, none, Larger{});
            if (is_first()) {
                params_.top_tokens[first + k] = int(~uint32_t(best));
                params_.top_logprobs[first + k] =
                    (double(from_ordered_bits(uint32_t(best >> 32))) - double(top_)) - log_total;
            }
            last = best;
        }
    }

    SampleParams const& params_;
    int const row_;
    SampleRow const& want_;
    SampleShared& shared_;
    SampleCluster const cluster_{};
    float* const logits_;
    SampleRun<Vector> run_;
    float top_, least_, bin_scale_;
    int top_token_;
    int turn_ = 0;
};

template <bool Vector>
__global__ void __launch_bounds__(SampleConfig::kThreads) sample_kernel(SampleParams const params) {
    alignas(16) __shared__ SampleShared shared;
    RowSampler<Vector>(params, int(blockIdx.x) / SampleCluster().size(), shared).sample();
}

__global__ void resolve_tokens_kernel(int32_t* input_ids, int num_tokens, int32_t const* tokens) {
    int const i = int(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < num_tokens && input_ids[i] < 0) input_ids[i] = tokens[-1 - input_ids[i]];
}

}  // namespace saw
