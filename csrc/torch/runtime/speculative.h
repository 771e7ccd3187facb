// Lossless self-speculative decoding: a part of the layers drafts, all of them verify the draft in one step. Both share
// the weights and one cache: the draft reads the verified keys and values of its layers and writes its own after them,
// which the verification then overwrites. Greedy decoding accepts what the full model would have said; sampling accepts
// a drafted token with probability min(1, p/q) and else draws from max(p − q, 0) (Leviathan et al. 2023), so that the
// text is distributed as without a draft.
#pragma once

#include "torch/runtime/generate.h"

namespace e3 {

struct SpeculationCounts {
  int64_t drafted = 0, accepted = 0, verifications = 0;
};

// Chooses the draft length k that maximises the expected tokens per cost,
//   (1 − aᵏ⁺¹)/(1 − a) / (1 + k·c),
// a the running acceptance rate, c the draft's share of the weight bytes of a full step. Where no draft pays, it asks
// for one token every kProbe rounds to see whether the text has become easier.
class DraftLength {
 public:
  DraftLength(double cost, int64_t longest) : cost_(cost), longest_(longest) {}

  void observe(int64_t drafted, int64_t accepted) {
    // Accepted tokens are the successes before the first failure, if the draft met one.
    tried_ = kMemory * tried_ + double(accepted + (accepted < drafted));
    passed_ = kMemory * passed_ + double(accepted);
  }

  int64_t next() {
    const double rate = std::min(passed_ / tried_, 0.999);
    int64_t best = 0;
    for (int64_t k = 1; k <= longest_; ++k)
      if (gain(rate, k) > gain(rate, best)) best = k;
    return best == 0 && idle_++ % kProbe == 0 ? 1 : best;
  }

 private:
  double gain(double rate, int64_t k) const {
    return (1 - std::pow(rate, double(k + 1))) / (1 - rate) / (1 + double(k) * cost_);
  }

  static constexpr double kMemory = 0.9;
  static constexpr int64_t kProbe = 16;
  const double cost_;
  const int64_t longest_;
  double tried_ = 1, passed_ = 0.7;
  int64_t idle_ = 0;
};

class Speculation {
 public:
  Speculation(Decoder& decoder, Cache& cache, const Plan& draft, const Request& request)
      : decoder_(decoder),
        cache_(cache),
        draft_(draft),
        request_(request),
        vocabulary_(decoder.model()->vocabulary()),
        sampler_(request.sampling, vocabulary_),
        uniform_(request.sampling.seed, 0),
        length_(cost_of_draft(), kLongestDraft) {
    TORCH_CHECK_VALUE(cache.batch() == 1, "speculative decoding takes one sequence, not ", cache.batch());
  }

  const SpeculationCounts& counts() const { return counts_; }

  Sequences run(const at::Tensor& prompt, const OnTokens& on_tokens) {
    Sequences sequences = rows_of(prompt);
    context_ = contexts_of(cache_, sequences)[0];
    std::vector<int64_t>& sequence = sequences[0];
    const size_t wanted = sequence.size() + size_t(request_.max_new_tokens);
    std::vector<int64_t> tokens;
    if (request_.max_new_tokens) tokens = {choose(decoder_.append(cache_, prompt, 1).data_ptr<float>(), context_)};
    while (true) {
      for (const int64_t token : tokens) {
        if (sequence.size() == wanted) return sequences;
        sequence.push_back(token);
        context_.tokens.push_back(token);
        const std::vector<bool> ended = on_tokens({token});
        if (request_.sampling.ends(token) || (!ended.empty() && ended[0])) return sequences;
      }
      if (sequence.size() == wanted) return sequences;
      tokens = round(int64_t(wanted - sequence.size()));
    }
  }

 private:
  // One draft and its verification: at least one token that follows the context, at most `room`.
  std::vector<int64_t> round(int64_t room) {
    const int64_t verified = cache_.length(), limit = decoder_.model()->max_positions - verified - 1;
    const int64_t count = std::max<int64_t>(0, std::min({length_.next(), room - 1, limit}));
    std::vector<int64_t> ids{context_.tokens.back()};
    const std::vector<std::vector<float>> proposals = draft(count, ids);
    cache_.truncate(verified);
    const at::Tensor logits = decoder_.append(cache_, row(ids), int64_t(ids.size()));
    const std::vector<int64_t> tokens = verify(logits.data_ptr<float>(), ids, proposals);
    const int64_t accepted = int64_t(tokens.size()) - 1;
    cache_.truncate(verified + 1 + accepted);
    if (count) length_.observe(count, accepted);
    counts_.drafted += count;
    counts_.accepted += accepted;
    ++counts_.verifications;
    return tokens;
  }

  // Appends `count` tokens of the draft to ids; returns the distribution that each was drawn from (sampling only).
  std::vector<std::vector<float>> draft(int64_t count, std::vector<int64_t>& ids) {
    std::vector<std::vector<float>> proposals;
    Context context = context_;
    for (int64_t i = 0; i < count; ++i) {
      const at::Tensor logits = decoder_.append(cache_, draft_, row({ids.back()}), 1);
      if (request_.sampling.sample) {
        proposals.push_back(sampler_.probabilities(logits.data_ptr<float>(), context));
        ids.push_back(Sampler::draw(proposals.back(), uniform_.next()));
      } else {
        ids.push_back(sampler_.largest(logits.data_ptr<float>(), context));
      }
      context.tokens.push_back(ids.back());
    }
    return proposals;
  }

  // The accepted drafted tokens and the one that follows them. `logits` are those after each of `ids`.
  std::vector<int64_t> verify(float* logits, const std::vector<int64_t>& ids,
                              const std::vector<std::vector<float>>& proposals) {
    std::vector<int64_t> tokens;
    Context context = context_;
    for (size_t i = 0;; ++i) {
      float* after = logits + int64_t(i) * vocabulary_;
      const bool last = i + 1 == ids.size();
      const int64_t token = last || !request_.sampling.sample
                                ? choose(after, context)
                                : accept_or_replace(after, context, ids[i + 1], proposals[i]);
      tokens.push_back(token);
      if (last || token != ids[i + 1]) return tokens;
      context.tokens.push_back(token);
    }
  }

  // `drafted` with probability min(1, p/q), else a draw from max(p − q, 0), which never gives `drafted`.
  int64_t accept_or_replace(float* logits, const Context& context, int64_t drafted,
                            const std::vector<float>& proposal) {
    const std::vector<float>& p = sampler_.probabilities(logits, context);
    if (uniform_.next() * proposal[drafted] < p[drafted]) return drafted;
    std::vector<float> rest(vocabulary_);
    for (int64_t i = 0; i < vocabulary_; ++i) rest[i] = std::max(p[i] - proposal[i], 0.0f);
    // p = q but for rounding: nothing is left to draw from.
    const bool equal = std::all_of(rest.begin(), rest.end(), [](float weight) { return weight == 0; });
    return Sampler::draw(equal ? p : rest, uniform_.next());
  }

  int64_t choose(float* logits, const Context& context) {
    if (!request_.sampling.sample) return sampler_.largest(logits, context);
    return Sampler::draw(sampler_.probabilities(logits, context), uniform_.next());
  }

  // A verification of eight tokens still takes the time of reading the weights; of sixteen, of the arithmetic.
  static constexpr int64_t kLongestDraft = 7;

  static at::Tensor row(const std::vector<int64_t>& ids) {
    return at::tensor(ids, at::kLong).view({1, int64_t(ids.size())});
  }

  double cost_of_draft() const {
    return double(decoder_.weight_bytes(draft_)) / double(decoder_.weight_bytes(cache_.plan()));
  }

  Decoder& decoder_;
  Cache& cache_;
  const Plan draft_;
  const Request request_;
  const int64_t vocabulary_;
  Sampler sampler_;
  Uniform uniform_;
  DraftLength length_;
  Context context_;
  SpeculationCounts counts_;
};

}  // namespace e3
