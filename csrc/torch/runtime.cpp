// e3kernels._runtime: what needs ATen. The layer-skipping decoder runtime and gumbel_topk's autograd, bound to Python.
#include <torch/extension.h>

#include "cuda/device_path.h"
#include "torch/gumbel_topk_autograd.h"
#include "torch/runtime/generate.h"
#include "torch/runtime/speculative.h"

namespace py = pybind11;
using namespace e3;

namespace {

Activation activation_of(const std::string& name) {
  if (name == "silu" || name == "swish") return Activation::silu;
  if (name == "gelu_pytorch_tanh" || name == "gelu_new") return Activation::gelu_tanh;
  if (name == "gelu") return Activation::gelu;
  if (name == "clamped_silu") return Activation::clamped_silu;
  throw py::value_error("activation '" + name + "' is not one of silu, gelu_pytorch_tanh, gelu, clamped_silu");
}

std::optional<Weight> optional_weight(const std::string& name, const std::optional<at::Tensor>& tensor) {
  return tensor ? std::optional(Weight(name, *tensor)) : std::nullopt;
}

void bind_model(py::module_& module) {
  py::class_<Weight>(module, "Weight").def(py::init<std::string, at::Tensor>(), py::arg("name"), py::arg("tensor"));
  py::class_<Linear>(module, "Linear")
      .def(py::init([](const std::string& name, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                       int64_t first, int64_t rows) {
             return Linear{Weight(name + ".weight", weight), optional_weight(name + ".bias", bias), first, rows};
           }),
           py::arg("name"), py::arg("weight"), py::arg("bias"), py::arg("first"), py::arg("rows"));
  py::class_<Norm>(module, "Norm")
      .def(py::init([](const std::string& name, const std::vector<at::Tensor>& weights,
                       const std::optional<at::Tensor>& bias, int64_t size, double eps, double offset, bool centred) {
             std::vector<Weight> all;
             for (const at::Tensor& weight : weights) all.emplace_back(name + ".weight", weight);
             return Norm(std::move(all), optional_weight(name + ".bias", bias), size, eps, offset, centred);
           }),
           py::arg("name"), py::arg("weights"), py::arg("bias"), py::arg("size"), py::arg("eps"), py::arg("offset"),
           py::arg("centred"));
  py::class_<Rotary>(module, "Rotary")
      .def(py::init([](const at::Tensor& frequencies, double scaling, bool in_turn) {
             return Rotary{frequencies.to(at::kFloat), scaling, in_turn, {}, {}, {}};
           }),
           py::arg("frequencies"), py::arg("scaling"), py::arg("in_turn"));
  py::class_<ExpertLinear>(module, "ExpertLinear")
      .def(py::init([](const std::string& name, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                       bool by_input) {
             return ExpertLinear{Weight(name, weight), optional_weight(name + "_bias", bias), by_input};
           }),
           py::arg("name"), py::arg("weight"), py::arg("bias"), py::arg("by_input"));
  py::class_<Experts>(module, "Experts")
      .def(py::init<>())
      .def_readwrite("router", &Experts::router)
      .def_property(
          "correction", [](const Experts& experts) { return experts.correction; },
          [](Experts& experts, const at::Tensor& values) { experts.correction = values.to(at::kFloat).contiguous(); })
      .def_readwrite("gate_up", &Experts::gate_up)
      .def_readwrite("down", &Experts::down)
      .def_readwrite("in_turn", &Experts::in_turn)
      .def_readwrite("sigmoid", &Experts::sigmoid)
      .def_readwrite("normalised", &Experts::normalised)
      .def_readwrite("scale", &Experts::scale)
      .def_readwrite("chosen", &Experts::chosen)
      .def_readwrite("groups", &Experts::groups)
      .def_readwrite("kept_groups", &Experts::kept_groups);
  py::class_<Latent>(module, "Latent")
      .def(py::init<>())
      .def_readwrite("rank", &Latent::rank)
      .def_readwrite("plain", &Latent::plain)
      .def_readwrite("rotated", &Latent::rotated)
      .def_readwrite("value_dim", &Latent::value_dim)
      .def_readwrite("query_down", &Latent::query_down)
      .def_readwrite("up", &Latent::up)
      .def_readwrite("query_norm", &Latent::query_norm)
      .def_readwrite("norm", &Latent::norm);
  py::class_<Conv>(module, "Conv")
      .def(py::init([](const std::string& name, const Linear& input, const at::Tensor& weight,
                       const std::optional<at::Tensor>& bias) {
             return Conv{input, Weight(name + ".weight", weight), optional_weight(name + ".bias", bias)};
           }),
           py::arg("name"), py::arg("input"), py::arg("weight"), py::arg("bias"));
  py::class_<LayerInput>(module, "LayerInput")
      .def(py::init<>())
      .def_readwrite("embedding", &LayerInput::embedding)
      .def_readwrite("first", &LayerInput::first)
      .def_readwrite("size", &LayerInput::size)
      .def_readwrite("embedding_scale", &LayerInput::embedding_scale)
      .def_readwrite("projection_scale", &LayerInput::projection_scale)
      .def_readwrite("scale", &LayerInput::scale)
      .def_readwrite("projection", &LayerInput::projection)
      .def_readwrite("gate", &LayerInput::gate)
      .def_readwrite("output", &LayerInput::output)
      .def_readwrite("norm", &LayerInput::norm)
      .def_readwrite("output_norm", &LayerInput::output_norm);
  py::class_<Layer>(module, "Layer")
      .def(py::init<>())
      .def_readwrite("attention_norm", &Layer::attention_norm)
      .def_readwrite("attention_post_norm", &Layer::attention_post_norm)
      .def_readwrite("mlp_norm", &Layer::mlp_norm)
      .def_readwrite("mlp_post_norm", &Layer::mlp_post_norm)
      .def_readwrite("query_norm", &Layer::query_norm)
      .def_readwrite("key_norm", &Layer::key_norm)
      .def_readwrite("value_norm", &Layer::value_norm)
      .def_readwrite("query", &Layer::query)
      .def_readwrite("key", &Layer::key)
      .def_readwrite("value", &Layer::value)
      .def_readwrite("output", &Layer::output)
      .def_readwrite("gate", &Layer::gate)
      .def_readwrite("up", &Layer::up)
      .def_readwrite("down", &Layer::down)
      .def_readwrite("latent", &Layer::latent)
      .def_readwrite("conv", &Layer::conv)
      .def_readwrite("experts", &Layer::experts)
      .def_readwrite("input", &Layer::input)
      .def_readwrite("cache_of", &Layer::cache_of)
      .def_readwrite("sinks", &Layer::sinks)
      .def_readwrite("heads", &Layer::heads)
      .def_readwrite("key_value_heads", &Layer::key_value_heads)
      .def_readwrite("head_dim", &Layer::head_dim)
      .def_readwrite("value_dim", &Layer::value_dim)
      .def_readwrite("rotary", &Layer::rotary)
      .def_readwrite("parallel", &Layer::parallel)
      .def_readwrite("scale", &Layer::scale)
      .def_readwrite("softcap", &Layer::softcap)
      .def_readwrite("output_scale", &Layer::output_scale)
      .def_readwrite("window", &Layer::window);
  py::class_<Model, std::shared_ptr<Model>>(module, "Model")
      .def(py::init<>())
      .def_readwrite("embedding", &Model::embedding)
      .def_readwrite("head", &Model::head)
      .def_readwrite("final_norm", &Model::final_norm)
      .def_readwrite("layers", &Model::layers)
      .def_readwrite("rotaries", &Model::rotaries)
      .def_readwrite("max_positions", &Model::max_positions)
      .def_readwrite("embedding_scale", &Model::embedding_scale)
      .def_readwrite("residual_scale", &Model::residual_scale)
      .def_readwrite("logit_scale", &Model::logit_scale)
      .def_readwrite("logit_softcap", &Model::logit_softcap)
      .def_readwrite("glu_slope", &Model::glu_slope)
      .def_readwrite("glu_limit", &Model::glu_limit)
      .def_property(
          "activation", [](const Model& model) { return int(model.activation); },
          [](Model& model, const std::string& name) { model.activation = activation_of(name); })
      .def("check_unchanged", &Model::check_unchanged);
}

void bind_cache(py::module_& module) {
  py::class_<KeptLayer>(module, "KeptLayer")
      .def(py::init<int, bool, bool>(), py::arg("layer"), py::arg("attention"), py::arg("mlp"))
      .def_readonly("layer", &KeptLayer::layer)
      .def_readonly("attention", &KeptLayer::attention)
      .def_readonly("mlp", &KeptLayer::mlp);
  py::class_<Cache, std::shared_ptr<Cache>>(module, "Cache")
      .def_property_readonly("length", &Cache::length)
      .def_property_readonly("batch", &Cache::batch)
      .def_property_readonly("bytes", &Cache::bytes)
      .def_property_readonly("starts", &Cache::starts)
      .def_property_readonly("plan", &Cache::plan)
      .def("set_starts", &Cache::set_starts)
      .def("truncate", &Cache::truncate)
      .def("select", &Cache::select);
}

// Calls `on_tokens` (None: nothing to call) with the GIL held and lets Ctrl-C through after every token.
OnTokens with_signals(const py::object& on_tokens) {
  return [&on_tokens](const std::vector<int64_t>& tokens) -> std::vector<bool> {
    const py::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals()) throw py::error_already_set();
    if (on_tokens.is_none()) return {};
    const py::object ended = on_tokens(tokens);
    return ended.is_none() ? std::vector<bool>{} : ended.cast<std::vector<bool>>();
  };
}

void bind_decoder(py::module_& module) {
  py::class_<Decoder>(module, "Decoder")
      .def(py::init([](std::shared_ptr<Model> model) {
        model->check_uniform();
        model->check_shapes();
        return std::make_unique<Decoder>(std::move(model));
      }))
      .def(
          "new_cache",
          [](const Decoder& decoder, const Plan& plan, int64_t batch, int64_t capacity) {
            return std::make_shared<Cache>(decoder.model(), plan, batch, capacity);
          },
          py::arg("plan"), py::arg("batch"), py::arg("capacity"))
      .def(
          "append",
          [](Decoder& decoder, Cache& cache, const at::Tensor& ids, int64_t keep) {
            const at::NoGradGuard inference;
            return decoder.append(cache, ids, keep);
          },
          py::arg("cache"), py::arg("ids"), py::arg("keep"), py::call_guard<py::gil_scoped_release>())
      .def("weight_bytes", &Decoder::weight_bytes, py::arg("plan"))
      .def_property_readonly("path", &Decoder::path)
      .def(
          "generate",
          [](Decoder& decoder, Cache& cache, const at::Tensor& ids, const Request& request,
             const py::object& on_tokens) {
            const at::NoGradGuard inference;
            const OnTokens callback = with_signals(on_tokens);
            const py::gil_scoped_release release;
            return generate(decoder, cache, ids, request, callback);
          },
          py::arg("cache"), py::arg("ids"), py::arg("request"), py::arg("on_tokens"))
      .def(
          "speculate",
          [](Decoder& decoder, Cache& cache, const Plan& draft, const at::Tensor& ids, const Request& request,
             const py::object& on_tokens) {
            const at::NoGradGuard inference;
            const OnTokens callback = with_signals(on_tokens);
            const py::gil_scoped_release release;
            Speculation speculation(decoder, cache, draft, request);
            Sequences sequences = speculation.run(ids, callback);
            return std::pair(std::move(sequences), speculation.counts());
          },
          py::arg("cache"), py::arg("draft"), py::arg("ids"), py::arg("request"), py::arg("on_tokens"));
}

void bind_request(py::module_& module) {
  py::class_<Request>(module, "Request")
      .def(py::init([](int64_t max_new_tokens, int64_t min_new_tokens, std::vector<int64_t> eos, int64_t pad,
                       bool sample, double temperature, int64_t top_k, double top_p, double min_p,
                       double repetition_penalty, int64_t no_repeat_ngram_size, uint64_t seed) {
             Request request{.max_new_tokens = max_new_tokens,
                             .pad = pad,
                             .sampling = {.sample = sample,
                                          .temperature = temperature,
                                          .top_p = top_p,
                                          .min_p = min_p,
                                          .repetition_penalty = repetition_penalty,
                                          .top_k = top_k,
                                          .no_repeat_ngram_size = no_repeat_ngram_size,
                                          .min_new_tokens = min_new_tokens,
                                          .eos = std::move(eos),
                                          .seed = seed}};
             request.sampling.check();
             return request;
           }),
           py::kw_only(), py::arg("max_new_tokens"), py::arg("min_new_tokens"), py::arg("eos"), py::arg("pad"),
           py::arg("sample"), py::arg("temperature"), py::arg("top_k"), py::arg("top_p"), py::arg("min_p"),
           py::arg("repetition_penalty"), py::arg("no_repeat_ngram_size"), py::arg("seed"));
  py::class_<SpeculationCounts>(module, "SpeculationCounts")
      .def_readonly("drafted", &SpeculationCounts::drafted)
      .def_readonly("accepted", &SpeculationCounts::accepted)
      .def_readonly("verifications", &SpeculationCounts::verifications);
}

// The instruction sets that this machine runs, narrowest first.
std::vector<std::string> instruction_sets() { return {kIsaNames, kIsaNames + static_cast<int>(detect_isa()) + 1}; }

// Whether a device of these facts runs the CUDA graph, and why; a part of `device_path` that no GPU is needed for.
std::pair<bool, std::string> choose_path(int capability, int driver, const std::string& kernels, int ptx, int binary) {
  using Facts = cuda::DeviceFacts;
  const auto found = kernels == "found" ? Facts::found : kernels == "no image" ? Facts::no_image : Facts::ptx_too_new;
  const cuda::DevicePath path = cuda::choose_path({capability, driver, found, ptx, binary});
  return {path.graph, path.reason};
}

// What runs a step of a few tokens on the current CUDA device, and why.
std::string device_path() {
#ifdef E3_WITH_CUDA
  const cuda::DevicePath path = cuda::path_of_device();
  return (path.graph ? "CUDA graph: " : "ATen: ") + path.reason;
#else
  return "ATen: the module is built without its CUDA half";
#endif
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("instruction_sets", instruction_sets);
  module.def("gumbel_topk", gumbel_topk);
  module.def("choose_path", choose_path);
  module.def("device_path", device_path);
  bind_model(module);
  bind_cache(module);
  bind_request(module);
  bind_decoder(module);
}
