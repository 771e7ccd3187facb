// Runs one kernel on a problem that a byte string describes. Buffers are exactly as large as the contract says, so that
// the sanitizers see every byte beyond them. Built as a libFuzzer target, or with E3_FUZZ_DRIVER as a program that
// makes its own inputs:  driver COUNT [SEED]
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <vector>

#include "kernels/ops_table.h"

namespace {

using namespace e3;

constexpr float kSpecial[] = {0.0f, -0.0f, 1.0f, INFINITY, -INFINITY, NAN, 1e38f, -3.4e38f, 1e-40f, 88.7f, -104.0f};
// Finite, and as far apart as they get without their differences being infinite.
constexpr float kExtreme[] = {1e38f, -1e38f, 0.0f, 2e9f, -2e9f, 1100.0f, -1100.0f, 1e30f, -1e30f, 200.0f};

// Bytes of the input, then zeros.
class Source {
 public:
  Source(const uint8_t* data, size_t size) : data_(data), left_(size) {}
  uint8_t byte() { return left_ > 0 ? (--left_, *data_++) : 0; }
  int64_t below(int64_t limit) { return ((byte() << 8) | byte()) % limit; }
  bool coin() { return byte() & 1; }
  double number() { return (byte() + 1) / 64.0; }
  // Mostly ordinary logits, now and then one that is not.
  float logit() {
    const uint8_t kind = byte();
    if (kind < 250) return (kind - 125) * 0.1f;
    return kSpecial[byte() % std::size(kSpecial)];
  }
  float extreme() { return kExtreme[byte() % std::size(kExtreme)]; }

 private:
  const uint8_t* data_;
  size_t left_;
};

uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>(bits >> 16);
}

// A heap buffer of one dtype; values repeat from a short list, so that long rows need few bytes.
class Buffer {
 public:
  Buffer(DType dtype, int64_t count) : dtype_(dtype), bytes_(count * size_of(dtype)), data_(new uint8_t[bytes_]) {}
  Buffer(Source& source, DType dtype, int64_t count) : Buffer(dtype, count) {
    float values[13];
    const bool extreme = source.byte() < 40;
    for (float& value : values) value = extreme ? source.extreme() : source.logit();
    for (const float value : values) finite_ &= std::isfinite(value) && dtype != DType::float16;
    for (int64_t i = 0; i < count; ++i) {
      const float value = values[i % 13];
      if (dtype == DType::float32) {
        std::memcpy(data_.get() + 4 * i, &value, 4);
      } else {
        const uint16_t bits = to_bf16(value);  // as fp16 any pattern is as good
        std::memcpy(data_.get() + 2 * i, &bits, 2);
      }
    }
  }
  uint8_t* get() { return data_.get(); }
  bool finite() const { return finite_; }

 private:
  DType dtype_;
  int64_t bytes_;
  bool finite_ = true;
  std::unique_ptr<uint8_t[]> data_;
};

// Two "threads" one after the other, the second first: an order on which nothing may depend.
Parallel pool_of(Source& source) {
  const auto run = [](int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
    const int64_t middle = begin + (end - begin) / 2;
    if (middle < end) body(middle, end, context);
    if (begin < middle) body(begin, middle, context);
  };
  return {source.coin() ? 4 : 1, run};
}

int64_t length_of(Source& source) {
  const uint8_t kind = source.byte();
  return kind < 4 ? 1 + source.below(5000) : 1 + source.below(kind < 128 ? 40 : 140);
}

DType dtype_of(Source& source) { return static_cast<DType>(source.byte() % 3); }

Transform transform_of(Source& source) {
  const bool plain = source.coin();
  return {plain ? 1.0f : static_cast<float>(source.number()), source.coin() ? 30.0f : 0.0f,
          plain ? 1.0f : static_cast<float>(source.number())};
}

struct LossCase {
  int64_t rows, vocabulary;
  std::vector<int64_t> labels;
  std::unique_ptr<bool[]> mask;
  Transform transform;
  double num_items = 3.0;
  Objective objective;
  Tokens tokens;
  std::vector<float> loss, stats, incoming;

  explicit LossCase(Source& source) : rows(source.below(6)), vocabulary(length_of(source)), labels(rows) {
    mask.reset(new bool[rows + 1]);
    for (int64_t i = 0; i < rows; ++i) {
      mask[i] = source.byte() < 200;
      labels[i] = source.byte() < 40 ? -100 : source.below(vocabulary);
    }
    transform = transform_of(source);
    objective = {static_cast<Weighting>(source.byte() % 4),
                 source.number(),
                 source.coin() ? 1.0 : 0.5,
                 transform.temperature,
                 static_cast<Reduction>(source.byte() % 3),
                 source.coin() ? &num_items : nullptr};
    tokens = {rows, source.coin() ? labels.data() : nullptr, source.coin() ? mask.get() : nullptr, -100};
    loss.resize(objective.reduction == Reduction::none ? rows : 1);
    stats.resize(4 * rows);
    incoming.assign(rows, 0.5f);
  }
};

// Aborts on NaN.
void check_numbers(const std::vector<float>& values, const char* what) {
  for (const float value : values) {
    if (!std::isnan(value)) continue;
    std::fprintf(stderr, "finite inputs, and NaN among the %s\n", what);
    std::abort();
  }
}

// `student` is where the gradient may replace the logits, null where their rows have gaps. Of finite logits, which
// neither scale nor temperature makes infinite, no loss and no statistic is NaN.
template <class Problem>
void run_loss(Source& source, LossCase& c, const Problem& problem, DType dtype, void* student, bool finite,
              void (*forward)(const Problem&, const Parallel&, const LossOutput&),
              void (*backward)(const Problem&, const Parallel&, const float*, bool, void*)) {
  Buffer fresh(dtype, c.rows * c.vocabulary);
  void* grad = student != nullptr && source.coin() ? student : fresh.get();
  const Parallel pool = pool_of(source);
  const bool need_grad = c.objective.reduction != Reduction::none && source.coin();
  forward(problem, pool, {c.loss.data(), c.stats.data(), need_grad ? grad : nullptr, source.coin()});
  if (finite && c.transform.scale == 1.0f && c.transform.temperature == 1.0f) {
    check_numbers(c.loss, "losses");
    check_numbers(c.stats, "statistics");
  }
  backward(problem, pool, c.incoming.data(), source.coin(), grad);
}

void run_entropy_kl(Source& source, const OpsTable& table) {
  LossCase c(source);
  const DType student_type = dtype_of(source), teacher_type = dtype_of(source);
  const int64_t gap = source.byte() % 4;
  const int64_t size = c.rows == 0 ? 0 : (c.rows - 1) * (c.vocabulary + gap) + c.vocabulary;
  Buffer student(source, student_type, size), teacher(source, teacher_type, size);
  const EntropyKl problem{c.vocabulary,
                          c.tokens,
                          {student_type, student.get(), c.vocabulary + gap},
                          {teacher_type, teacher.get(), c.vocabulary + gap},
                          c.transform,
                          {1.0f, source.coin() ? 20.0f : 0.0f, c.transform.temperature},
                          static_cast<Divergence>(source.byte() % 4),
                          0.3,
                          c.objective};
  run_loss(source, c, problem, student_type, gap == 0 ? student.get() : nullptr, student.finite() && teacher.finite(),
           table.entropy_kl, table.entropy_kl_backward);
}

void run_topk_kl(Source& source, const OpsTable& table) {
  LossCase c(source);
  const DType dtype = dtype_of(source);
  const int64_t k = 1 + source.below(c.vocabulary < 12 ? c.vocabulary : 12), gap = source.byte() % 4;
  Buffer student(source, dtype, c.rows == 0 ? 0 : (c.rows - 1) * (c.vocabulary + gap) + c.vocabulary);
  std::vector<float> logprobs(c.rows * k);
  std::vector<int64_t> ids(c.rows * k);
  bool finite = student.finite();
  for (int64_t i = 0; i < c.rows * k; ++i) {
    const bool empty = i % k == 0 ? source.byte() < 20 : logprobs[i - 1] == -INFINITY && source.byte() < 100;
    const bool padding = empty || source.byte() < 20;
    logprobs[i] = padding ? -INFINITY : -std::fabs(source.logit());
    finite &= padding || std::isfinite(logprobs[i]);
    // An id now and then again; of padding, and of tokens that do not count, what no vocabulary has.
    ids[i] = i % k > 0 && source.byte() < 60 ? ids[i - 1 - source.below(i % k)] : source.below(c.vocabulary);
    const bool kept = !padding && c.tokens.valid(i / k);
    if (kept ? ids[i] < 0 : source.byte() < 60) ids[i] = kept ? 0 : int64_t{1} << (source.byte() % 63);
    if (!kept && source.coin()) ids[i] = -ids[i];
    if (kept && ids[i] >= c.vocabulary) ids[i] %= c.vocabulary;
  }
  const TopkKl problem{c.vocabulary,
                       k,
                       c.tokens,
                       {dtype, student.get(), c.vocabulary + gap},
                       logprobs.data(),
                       ids.data(),
                       c.transform,
                       static_cast<Tail>(source.byte() % 3),
                       static_cast<Divergence>(source.byte() % 4),
                       0.3,
                       c.objective};
  run_loss(source, c, problem, dtype, gap == 0 ? student.get() : nullptr, finite, table.topk_kl,
           table.topk_kl_backward);
}

void run_gumbel_topk(Source& source, const OpsTable& table) {
  const DType dtype = dtype_of(source);
  const int64_t rows = source.below(5), length = 1 + source.below(40), column_stride = 1 + source.byte() % 2;
  const int64_t stride = source.coin() ? 0 : length * column_stride;
  const int64_t size = rows == 0 ? 0 : (rows - 1) * stride + (length - 1) * column_stride + 1;
  Buffer logits(source, dtype, size), mask(dtype, rows * length), probs(dtype, rows * length);
  Buffer incoming(source, dtype, rows * length), grad(dtype, rows * length);
  const GumbelTopk problem{{dtype, logits.get(), stride},
                           column_stride,
                           rows,
                           length,
                           source.below(length + 1),
                           source.number(),
                           source.coin() ? source.number() : 0.0,
                           source.byte() * 0x123456789abcull,
                           source.byte() * 0xabcdef01234ull,
                           static_cast<Relaxation>(source.byte() % 3)};
  const Parallel pool = pool_of(source);
  table.gumbel_topk(problem, pool, mask.get(), probs.get());
  if (problem.k == 0 || problem.k == length) return;
  table.gumbel_topk_backward(problem, {incoming.get(), probs.get()}, pool, grad.get());
}

void run_gated_residual(Source& source, const OpsTable& table) {
  const DType dtype = dtype_of(source), gate_type = dtype_of(source);
  const int64_t rows = 1 + source.below(4), columns = length_of(source);
  const bool by_element = source.coin();
  const int64_t gates = by_element ? rows * columns : rows;
  Buffer hidden(source, dtype, rows * columns), branch(source, dtype, rows * columns), gate(source, gate_type, gates);
  Buffer grad(source, dtype, rows * columns), out(dtype, rows * columns), dh(dtype, rows * columns);
  std::vector<float> dm(gates);
  const GatedResidual problem{dtype, rows, columns, hidden.get(), branch.get(), gate.get(), gate_type, by_element};
  const Parallel pool = pool_of(source);
  table.gated_residual(problem, pool, source.coin(), out.get());
  table.gated_residual_backward(problem, grad.get(), pool, source.coin(), dh.get(), out.get(), dm.data());
}

void run_linear(Source& source, const OpsTable& table) {
  const DType dtype = source.coin() ? DType::float32 : DType::bfloat16;
  if (!table.has_linear(dtype)) return;
  const int64_t rows = 1 + source.below(110), width = 1 + source.below(150), vocabulary = 1 + source.below(200);
  const int64_t gap = source.byte() % 3, stride = width + gap;
  Buffer hidden(source, dtype, rows * stride - gap), weight(source, dtype, vocabulary * stride - gap);
  Buffer bias(source, dtype, vocabulary), logits(dtype, rows * vocabulary), grad(dtype, rows * width);
  const Rows weight_rows{dtype, weight.get(), stride};
  const void* offset = source.coin() ? bias.get() : nullptr;
  const Parallel pool = pool_of(source);
  table.linear_logits({rows, width, vocabulary, {dtype, hidden.get(), stride}, weight_rows, offset, logits.get()},
                      pool);
  table.linear_grad_hidden({rows, width, vocabulary, {dtype, logits.get(), vocabulary}, weight_rows, grad.get()}, pool);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const int sets = static_cast<int>(detect_isa()) + 1;  // every instruction set that this machine runs
  Source source(data, size);
  const OpsTable& table = *table_of(static_cast<Isa>(source.byte() % sets));
  switch (source.byte() % 5) {
    case 0: run_entropy_kl(source, table); break;
    case 1: run_topk_kl(source, table); break;
    case 2: run_gumbel_topk(source, table); break;
    case 3: run_linear(source, table); break;
    default: run_gated_residual(source, table);
  }
  return 0;
}

#if defined(E3_FUZZ_DRIVER)
int main(int count, char** arguments) {
  const long inputs = count > 1 ? std::atol(arguments[1]) : 1000;
  uint64_t state = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 1;
  uint8_t bytes[160];
  for (long input = 0; input < inputs; ++input) {
    for (uint8_t& byte : bytes) {  // xorshift64*
      state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
      byte = static_cast<uint8_t>((state * 0x2545F4914F6CDD1Dull) >> 56);
    }
    LLVMFuzzerTestOneInput(bytes, sizeof bytes);
  }
  std::printf("%ld inputs, instruction sets up to %s: clean\n", inputs, kIsaNames[static_cast<int>(detect_isa())]);
}
#endif
