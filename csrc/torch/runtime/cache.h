// The keys and values of one request, for the layers that this request keeps.
#pragma once

#include "torch/runtime/model.h"

namespace e3 {

// A layer of the model that a request runs, whole or one of its two blocks.
struct KeptLayer {
  int layer;
  bool attention, mlp;
};

using Plan = std::vector<KeptLayer>;

class Cache {
 public:
  Cache(std::shared_ptr<const Model> model, Plan plan, int64_t batch, int64_t capacity)
      : model_(std::move(model)), plan_(std::move(plan)), starts_(batch, 0) {
    TORCH_CHECK_VALUE(batch > 0, "batch is ", batch, "; it must be positive");
    keys_.resize(model_->layers.size());
    values_.resize(model_->layers.size());
    resize(capacity);
  }

  const Model& model() const { return *model_; }
  const Plan& plan() const { return plan_; }
  int64_t batch() const { return int64_t(starts_.size()); }
  int64_t length() const { return length_; }
  int64_t capacity() const { return capacity_; }
  const std::vector<int64_t>& starts() const { return starts_; }
  // (batch, key/value heads, capacity, head_dim or value_dim) of a layer, or of the one whose it reads; undefined for
  // what it does not hold.
  const at::Tensor& keys(int layer) const { return keys_[owner_of(layer)]; }
  const at::Tensor& values(int layer) const { return values_[owner_of(layer)]; }

  // The first slot of every sequence that is not padding; only before the first token.
  void set_starts(std::vector<int64_t> starts) {
    TORCH_CHECK_VALUE(length_ == 0 && int64_t(starts.size()) == batch(), "padding is given for ", starts.size(),
                      " sequences at length ", length_, "; the cache holds ", batch(), " and takes it at length 0");
    starts_ = std::move(starts);
  }

  void reserve(int64_t slots) {
    TORCH_CHECK_VALUE(slots <= model_->max_positions, "the context would hold ", slots,
                      " tokens; the model's limit is ", model_->max_positions);
    if (slots > capacity_) resize(std::min(std::max(slots, 2 * capacity_), model_->max_positions));
  }

  void advance(int64_t slots) { length_ += slots; }

  void truncate(int64_t length) {
    TORCH_CHECK_VALUE(length >= 0 && length <= length_, "length is ", length, "; the cache holds ", length_);
    length_ = length;
  }

  // Sequence i becomes what sequence indices[i] was (beam search).
  void select(const at::Tensor& indices) {
    std::vector<int64_t> starts;
    const at::Tensor order = indices.to(at::kCPU, at::kLong).contiguous();
    for (int64_t i = 0; i < order.numel(); ++i) {
      const int64_t from = order.data_ptr<int64_t>()[i];
      TORCH_CHECK_VALUE(from >= 0 && from < batch(), "sequence ", from, " is not one of ", batch());
      starts.push_back(starts_[from]);
    }
    starts_ = std::move(starts);
    for (std::vector<at::Tensor>* kind : {&keys_, &values_})
      for (at::Tensor& tensor : *kind)
        if (tensor.defined()) tensor = tensor.index_select(0, order.to(tensor.device()));
  }

  int64_t bytes() const {
    int64_t total = 0;
    for (const std::vector<at::Tensor>* kind : {&keys_, &values_})
      for (const at::Tensor& tensor : *kind)
        if (tensor.defined()) total += int64_t(tensor.nbytes());
    return total;
  }

 private:
  int owner_of(int layer) const {
    const int owner = model_->layers[layer].cache_of;
    return owner < 0 ? layer : owner;
  }

  void resize(int64_t capacity) {
    capacity_ = std::max<int64_t>(capacity, 64);
    const auto options = at::TensorOptions().dtype(model_->dtype()).device(model_->device());
    for (const KeptLayer& kept : plan_) {
      if (!kept.attention) continue;
      const Layer& layer = model_->layers[kept.layer];
      if (layer.cache_of >= 0) continue;
      const auto grow = [&](at::Tensor& tensor, int64_t dim) {
        // Zeros, not what the memory held: padding slots are multiplied by a weight of 0.
        at::Tensor grown = at::zeros({batch(), layer.key_value_heads, capacity_, dim}, options);
        if (tensor.defined()) grown.narrow(2, 0, length_).copy_(tensor.narrow(2, 0, length_));
        tensor = std::move(grown);
      };
      grow(keys_[kept.layer], layer.head_dim);
      if (!layer.latent && !layer.conv) grow(values_[kept.layer], layer.value_dim);
    }
  }

  std::shared_ptr<const Model> model_;
  Plan plan_;
  std::vector<int64_t> starts_;
  std::vector<at::Tensor> keys_, values_;
  int64_t length_ = 0, capacity_ = 0;
};

}  // namespace e3
