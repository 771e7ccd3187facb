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
        sampler_(sampler_for(*decoder.model(), request.sampling)),
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
    if (request_.max_new_tokens) tokens = {choose(decoder_.append(cache_, prompt, 1).squeeze(0), context_)};
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
    const std::vector<at::Tensor> proposals = draft(count, ids);
    cache_.truncate(verified);
    const at::Tensor logits = decoder_.append(cache_, row(ids), int64_t(ids.size())).squeeze(0);
    const std::vector<int64_t> tokens = verify(logits, ids, proposals);
    const int64_t accepted = int64_t(tokens.size()) - 1;
    cache_.truncate(verified + 1 + accepted);
    if (count) length_.observe(count, accepted);
    counts_.drafted += count;
    counts_.accepted += accepted;
    ++counts_.verifications;
    return tokens;
  }

  // Appends `count` tokens of the draft to ids; returns the distribution (1, vocabulary) that each was drawn from
  // (sampling only).
  std::vector<at::Tensor> draft(int64_t count, std::vector<int64_t>& ids) {
    std::vector<at::Tensor> proposals;
    Context context = context_;
    for (int64_t i = 0; i < count; ++i) {
      const at::Tensor logits = decoder_.append(cache_, draft_, row({ids.back()}), 1).squeeze(0);
      if (request_.sampling.sample) {
        const auto [weights, largest] = sampler_->probabilities(logits, {&context});
        proposals.push_back(weights);
        ids.push_back(Sampler::to_host(sampler_->draw(weights, {uniform_.next()}), largest).token(0));
      } else {
        ids.push_back(choose(logits, context));
      }
      context.tokens.push_back(ids.back());
    }
    return proposals;
  }

  // The accepted drafted tokens and the one that follows them. `logits` (ids, vocabulary) are those after each of
  // `ids`.
  std::vector<int64_t> verify(const at::Tensor& logits, const std::vector<int64_t>& ids,
                              const std::vector<at::Tensor>& proposals) {
    std::vector<Context> after{context_};  // were all drafted tokens accepted
    for (size_t i = 1; i < ids.size(); ++i) {
      after.push_back(after.back());
      after.back().tokens.push_back(ids[i]);
    }
    Contexts contexts;
    for (const Context& context : after) contexts.push_back(&context);
    return request_.sampling.sample ? verify_samples(logits, contexts, ids, proposals)
                                    : verify_largest(logits, contexts, ids);
  }

  std::vector<int64_t> verify_largest(const at::Tensor& logits, const Contexts& contexts,
                                      const std::vector<int64_t>& ids) {
    const Choices choices = sampler_->largest(logits, contexts);
    std::vector<int64_t> tokens{choices.token(0)};
    while (tokens.size() < ids.size() && tokens.back() == ids[tokens.size()])
      tokens.push_back(choices.token(tokens.size()));
    return tokens;
  }

  // A drafted token is accepted with probability min(1, p/q); else the next is drawn from max(p − q, 0), which never
  // gives it.
  std::vector<int64_t> verify_samples(const at::Tensor& logits, const Contexts& contexts,
                                      const std::vector<int64_t>& ids, const std::vector<at::Tensor>& proposals) {
    const auto [p, largest] = sampler_->probabilities(logits, contexts);
    const int64_t count = int64_t(proposals.size());
    std::vector<at::Tensor> crossing{largest.to(at::kDouble)};
    if (count) {
      const std::vector<int64_t> drafted(ids.begin() + 1, ids.end());
      const at::Tensor index = at::tensor(drafted, at::kLong).unsqueeze(1).to(p.device());
      for (const at::Tensor& weights : {p.narrow(0, 0, count), at::cat(proposals)})
        crossing.push_back(weights.gather(1, index).squeeze(1).to(at::kDouble));
    }
    const at::Tensor host = at::cat(crossing).to(at::kCPU);
    const double* of_row = host.data_ptr<double>();
    const double *p_drafted = of_row + count + 1, *q_drafted = p_drafted + count;
    const Choices sound{ids, {of_row, of_row + count + 1}};
    std::vector<int64_t> tokens;
    for (int64_t i = 0;; ++i) {
      sound.token(size_t(i));
      if (i < count && uniform_.next() * q_drafted[i] < p_drafted[i]) {
        tokens.push_back(ids[i + 1]);
        continue;
      }
      at::Tensor weights = p.narrow(0, i, 1);
      if (i < count) {
        const at::Tensor rest = (weights - proposals[i]).clamp_min(0);
        weights = at::where(rest.any(), rest, weights);  // p = q but for rounding: nothing is left to draw from
      }
      tokens.push_back(sampler_->draw(weights, {uniform_.next()}).item<int64_t>());
      return tokens;
    }
  }

  int64_t choose(const at::Tensor& logits, const Context& context) {
    return sampler_->choose(logits, {&context}, {request_.sampling.sample ? uniform_.next() : 0.0}).token(0);
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
  const std::unique_ptr<Sampler> sampler_;
  Uniform uniform_;
  DraftLength length_;
  Context context_;
  SpeculationCounts counts_;
};

}  // namespace e3
