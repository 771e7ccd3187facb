// From logits to tokens: the processors of Hugging Face's `generate` in its order (repetition penalty, no repeated
// n-grams, no early end, temperature, top-k, top-p, min-p), then the largest logit or a draw. It happens where the
// logits are: on the CPU by our kernels, on any other device by ATen, and then only token ids come to the host.
#pragma once

#include <cmath>
#include <limits>
#include <memory>

#include "torch/runtime/sampling.h"

namespace e3 {

// The tokens chosen for some rows of logits, and the largest logit of each row, which says whether the row is sound.
struct Choices {
  std::vector<int64_t> tokens;
  std::vector<double> largest;  // NaN if any logit of the row is

  // Of row i. Raises where a logit of it is NaN, the largest is infinite or no token is left.
  int64_t token(size_t i) const {
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    TORCH_CHECK(largest[i] < kInfinity, "the logits of the next token are not finite");
    TORCH_CHECK(largest[i] > -kInfinity,
                "no token is left: each has the logit -inf or is excluded by no_repeat_ngram_size or min_new_tokens");
    return tokens[i];
  }
};

// Logits are (rows, vocabulary), fp32, dense, and overwritten; `contexts` and `uniforms` have one entry a row. The
// weights of `draw` are those of `probabilities`, or any that are not negative and sum to at most 1.
class Sampler {
 public:
  Sampler(const Sampling& sampling, int64_t vocabulary) : sampling_(sampling), vocabulary_(vocabulary) {}
  virtual ~Sampler() = default;

  // The largest logits that the processors leave, the lowest index of equals.
  virtual Choices largest(const at::Tensor& logits, const Contexts& contexts) = 0;

  // Probabilities of the next token after all processors, and the largest logits.
  virtual std::pair<at::Tensor, at::Tensor> probabilities(const at::Tensor& logits, const Contexts& contexts) = 0;

  // The token of each row whose share of the cumulated weights holds u ∈ [0, 1).
  virtual at::Tensor draw(const at::Tensor& weights, const std::vector<double>& uniforms) = 0;

  // The next token of each row.
  Choices choose(const at::Tensor& logits, const Contexts& contexts, const std::vector<double>& uniforms) {
    if (!sampling_.sample) return largest(logits, contexts);
    const auto [weights, largest] = probabilities(logits, contexts);
    return to_host(draw(weights, uniforms), largest);
  }

  // Ids below 2⁵³ are exact in fp64, so that ids and logits cross in one copy.
  static Choices to_host(const at::Tensor& tokens, const at::Tensor& largest) {
    const at::Tensor both = at::stack({tokens.to(at::kDouble), largest.to(at::kDouble)}).to(at::kCPU);
    const double* data = both.data_ptr<double>();
    const int64_t count = tokens.numel();
    return {{data, data + count}, {data + count, data + 2 * count}};
  }

 protected:
  const Sampling sampling_;
  const int64_t vocabulary_;
};

}  // namespace e3
