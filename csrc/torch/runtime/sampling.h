// What a request asks of the choice of its tokens, and what the choice depends on: the tokens so far, and uniform
// numbers.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/PhiloxRNGEngine.h>

#include <algorithm>
#include <vector>

namespace e3 {

struct Sampling {
  bool sample = false;
  double temperature = 1, top_p = 1, min_p = 0, repetition_penalty = 1;
  int64_t top_k = 0;                 // 0: all
  int64_t no_repeat_ngram_size = 0;  // 0: n-grams may be repeated
  int64_t min_new_tokens = 0;
  std::vector<int64_t> eos;
  uint64_t seed = 0;

  bool ends(int64_t token) const { return std::find(eos.begin(), eos.end(), token) != eos.end(); }

  void check() const {
    TORCH_CHECK_VALUE(temperature > 0, "temperature is ", temperature,
                      "; it must be positive (greedy: do_sample=False)");
    TORCH_CHECK_VALUE(top_p > 0 && top_p <= 1, "top_p is ", top_p, "; it must be in (0, 1]");
    TORCH_CHECK_VALUE(top_k >= 0, "top_k is ", top_k, "; it must be at least 0 (0: all)");
    TORCH_CHECK_VALUE(min_p >= 0 && min_p <= 1, "min_p is ", min_p, "; it must be in [0, 1]");
    TORCH_CHECK_VALUE(repetition_penalty > 0, "repetition_penalty is ", repetition_penalty, "; it must be positive");
    TORCH_CHECK_VALUE(no_repeat_ngram_size >= 0, "no_repeat_ngram_size is ", no_repeat_ngram_size,
                      "; it must be at least 0 (0: off)");
    TORCH_CHECK_VALUE(min_new_tokens >= 0, "min_new_tokens is ", min_new_tokens, "; it must be at least 0");
  }
};

// The tokens of one sequence so far, without its padding.
struct Context {
  std::vector<int64_t> tokens;
  int64_t prompt = 0;  // how many of them were given

  int64_t generated() const { return int64_t(tokens.size()) - prompt; }

  // Each token once, for the repetition penalty; a prompt may hold tokens that the output head does not know.
  std::vector<int64_t> distinct(int64_t vocabulary) const {
    std::vector<int64_t> out = tokens;
    std::sort(out.begin(), out.end());
    out.erase(std::unique(out.begin(), out.end()), out.end());
    out.erase(std::lower_bound(out.begin(), out.end(), vocabulary), out.end());
    return out;
  }

  // What may not come next: the tokens that would complete an n-gram which the context holds already, and an end that
  // would come too early.
  std::vector<int64_t> excluded(const Sampling& sampling, int64_t vocabulary) const {
    std::vector<int64_t> out;
    const int64_t before = sampling.no_repeat_ngram_size - 1;  // tokens of the n-gram before its last
    if (before >= 0 && int64_t(tokens.size()) > before) {
      const auto prefix = tokens.end() - before;
      for (auto ngram = tokens.begin(); ngram < prefix; ++ngram)
        if (std::equal(prefix, tokens.end(), ngram)) out.push_back(ngram[before]);
    }
    if (generated() < sampling.min_new_tokens) out.insert(out.end(), sampling.eos.begin(), sampling.eos.end());
    std::erase_if(out, [&](int64_t token) { return token < 0 || token >= vocabulary; });
    return out;
  }
};

using Contexts = std::vector<const Context*>;

// Uniform numbers in [0, 1) of one sequence, by counter from (seed, sequence).
class Uniform {
 public:
  Uniform(uint64_t seed, uint64_t sequence) : engine_(seed, sequence, 0) {}
  double next() {
    const uint64_t high = engine_() >> 5, low = engine_() >> 6;  // 27 + 26 bits
    return double((high << 26) | low) * 0x1p-53;
  }

 private:
  at::Philox4_32 engine_;
};

}  // namespace e3
