// The generation loop: nothing of it is Python but the optional callback.
#pragma once

#include <functional>

#include "torch/runtime/decoder.h"
#include "torch/runtime/device_sampler.h"
#include "torch/runtime/host_sampler.h"

namespace e3 {

struct Request {
  int64_t max_new_tokens = 0;
  int64_t pad = 0;  // what a finished sequence emits while others go on
  Sampling sampling;
};

// Called with the tokens of every step, one a sequence; returns which sequences end here (empty: none).
using OnTokens = std::function<std::vector<bool>(const std::vector<int64_t>&)>;

// The tokens of every sequence: (batch, prompt) first, then what is generated.
using Sequences = std::vector<std::vector<int64_t>>;

inline Sequences rows_of(const at::Tensor& ids) {
  const at::Tensor host = ids.to(at::kCPU).contiguous();
  const int64_t* data = host.data_ptr<int64_t>();
  Sequences rows;
  for (int64_t b = 0; b < host.size(0); ++b, data += host.size(1)) rows.emplace_back(data, data + host.size(1));
  return rows;
}

inline std::vector<Context> contexts_of(const Cache& cache, const Sequences& prompts) {
  std::vector<Context> contexts;
  for (size_t b = 0; b < prompts.size(); ++b)
    contexts.push_back(
        {{prompts[b].begin() + cache.starts()[b], prompts[b].end()}, int64_t(prompts[b].size()) - cache.starts()[b]});
  return contexts;
}

inline std::unique_ptr<Sampler> sampler_for(const Model& model, const Sampling& sampling) {
  if (model.device().is_cpu()) return std::make_unique<HostSampler>(sampling, model.vocabulary());
  return std::make_unique<DeviceSampler>(sampling, model.vocabulary());
}

inline Sequences generate(Decoder& decoder, Cache& cache, const at::Tensor& prompt, const Request& request,
                          const OnTokens& on_tokens) {
  const int64_t batch = prompt.size(0);
  Sequences sequences = rows_of(prompt);
  std::vector<Context> contexts = contexts_of(cache, sequences);
  const std::unique_ptr<Sampler> sampler = sampler_for(*decoder.model(), request.sampling);
  std::vector<Uniform> uniforms;
  for (int64_t b = 0; b < batch; ++b) uniforms.emplace_back(request.sampling.seed, b);
  std::vector<bool> finished(batch, false);
  at::Tensor ids = prompt;
  for (int64_t step = 0; step < request.max_new_tokens; ++step) {
    at::Tensor logits = decoder.append(cache, ids, 1).squeeze(1);
    RECORD_USER_SCOPE("runtime sample");
    std::vector<int64_t> running;
    Contexts of_running;
    std::vector<double> u;
    for (int64_t b = 0; b < batch; ++b) {
      if (finished[b]) continue;
      running.push_back(b);
      of_running.push_back(&contexts[b]);
      u.push_back(request.sampling.sample ? uniforms[b].next() : 0.0);
    }
    if (int64_t(running.size()) < batch)
      logits = logits.index_select(0, at::tensor(running, at::kLong).to(logits.device()));
    const Choices choices = sampler->choose(logits, of_running, u);
    std::vector<int64_t> tokens(batch, request.pad);
    for (size_t i = 0; i < running.size(); ++i) {
      const int64_t b = running[i];
      tokens[b] = choices.token(i);
      finished[b] = request.sampling.ends(tokens[b]);
    }
    for (int64_t b = 0; b < batch; ++b) {
      sequences[b].push_back(tokens[b]);
      contexts[b].tokens.push_back(tokens[b]);
    }
    const std::vector<bool> ended = on_tokens(tokens);
    for (size_t b = 0; b < ended.size(); ++b) finished[b] = finished[b] || ended[b];
    if (std::find(finished.begin(), finished.end(), false) == finished.end()) break;
    ids = at::tensor(tokens, at::kLong).view({batch, 1});
  }
  return sequences;
}

}  // namespace e3
