// token_logps_backward's gradients of weight and bias in tiles: each chunk of the vocabulary visits all tokens, from
// retained exponentials or from products made again.
#include <array>
#include <limits>
#include <vector>

#include "fused.h"

namespace fastdpo::cpu {
namespace {

// What the sums of a chunk's gradient may take up per thread: the larger the chunk, the less often hidden is packed.
constexpr int64_t kSumBytes = 8 << 20;
constexpr int64_t kMaxChunk = 1024;

inline int64_t chunk_of(int64_t hidden_size) {
  const int64_t fit = kSumBytes / static_cast<int64_t>(sizeof(float)) / round_up(hidden_size, kPanel);
  return std::clamp(fit / kTileEntries * kTileEntries, kTileEntries, kMaxChunk);
}

// Scored tokens in the order of their targets: a chunk of the vocabulary finds its own in one place.
std::vector<int64_t> tokens_by_target(const Problem<float>& problem) {
  std::vector<int64_t> tokens(problem.count());
  for (int64_t i = 0; i < problem.count(); ++i) tokens[i] = i;
  std::stable_sort(tokens.begin(), tokens.end(),
                   [&](int64_t a, int64_t b) { return problem.target(a) < problem.target(b); });
  return tokens;
}

template <typename O>
class WeightChunks {
 public:
  WeightChunks(const Problem<float>& problem, const Retained<O>& retained,
               const std::vector<RowCoefficients>& coefficients, const std::vector<int64_t>& by_target,
               const Gradients& gradients)
      : problem_(problem),
        retained_(retained),
        coefficients_(coefficients),
        by_target_(by_target),
        gradients_(gradients),
        size_(problem.hidden_size()),
        stride_(round_up(size_, kPanel)),
        chunk_(chunk_of(size_)),
        recomputes_(retained.tokens() < problem.count()),
        hidden_rows_(problem.hidden, kBlockTokens),
        weight_rows_(problem.weight, recomputes_ ? kTileEntries : 0),
        hidden_(gradients.weight.defined() ? packed_rows_size<O>(kBlockTokens, size_) : 0),
        columns_(recomputes_ ? kBlockTokens * size_ : 0),
        logits_(recomputes_ ? kTileEntries * kTileTokens : 0),
        operand_(kTileEntries * kBlockTokens),
        sum_(gradients.weight.defined() ? chunk_ * stride_ : 0),
        bias_sum_(chunk_) {}

  // Entries [task * chunk, ...).
  void run(int64_t task) {
    first_ = task * chunk_;
    rows_ = std::min(chunk_, problem_.vocabulary() - first_);
    std::fill(bias_sum_.begin(), bias_sum_.end(), 0.0f);
    if (problem_.count() == 0 && gradients_.weight.defined()) std::fill_n(sum_.data(), rows_ * stride_, 0.0f);
    // Blocks of tokens never mix the two kinds, and always come in this order: the sums' rounding repeats.
    for (int64_t t = 0; t < retained_.tokens(); t += kBlockTokens) {
      add_block(t, std::min(kBlockTokens, retained_.tokens() - t), true);
    }
    for (int64_t t = retained_.tokens(); t < problem_.count(); t += kBlockTokens) {
      add_block(t, std::min(kBlockTokens, problem_.count() - t), false);
    }
    add_targets();
    write();
  }

 private:
  // Tokens [t, t + count).
  void add_block(int64_t t, int64_t count, bool retained) {
    load_block(t, count, retained);
    for (int64_t v = 0; v < rows_; v += kTileEntries) {
      const int64_t rows = std::min(kTileEntries, rows_ - v);
      const O* operand = operand_.data();
      int64_t operand_stride = kBlockTokens;
      if (retained && count % kLaneGroup == 0) {
        operand_stride = count;
        operand = retained_.block(t) + (first_ + v) * count;
      } else if (retained) {
        copy_retained(t, count, v, rows);
      } else {
        recompute(count, v, rows);
      }
      if (gradients_.weight.defined()) {
        multiply_rows(rows, round_up(count, kLaneGroup), size_, operand, operand_stride, hidden_.data(),
                      sum_.data() + v * stride_, t > 0);
      }
      if (gradients_.bias.defined()) {
        kernels_.add_row_dots(operand, operand_stride, rows, round_up(count, kLaneGroup),
                              retained ? of_operand_.data() : ones_.data(), bias_sum_.data() + v);
      }
    }
  }

  // The block's hidden states as the product wants them. Retained exponentials are as the forward left them: their
  // coefficient is a factor of the hidden state instead.
  void load_block(int64_t t, int64_t count, bool retained) {
    of_operand_.fill(0.0f);
    // Of places that no token fills: whatever the bias is there, its exponential is 0, which a coefficient of 0 would
    // not make of infinity.
    exponents_.fill(std::numeric_limits<float>::max());
    ones_.fill(0.0f);
    for (int64_t i = 0; i < count; ++i) {
      rows_of_block_[i] = hidden_rows_.row(problem_.rows()[t + i], i);
      of_operand_[i] = static_cast<float>(coefficients_[t + i].of_operand);
      exponents_[i] = static_cast<float>(coefficients_[t + i].exponent);
      ones_[i] = 1.0f;
      targets_[i] = problem_.target(t + i);
    }
    if (gradients_.weight.defined()) {
      kernels_.pack_rows(rows_of_block_.data(), retained ? of_operand_.data() : nullptr, count, size_, hidden_.data());
    }
    if (retained) return;
    for (int64_t i = 0; i < count; i += kTileTokens) {
      kernels_.pack_columns(rows_of_block_.data() + i, std::min(kTileTokens, count - i), size_, width_of(count, i),
                            columns_.data() + i * size_);
    }
  }

  static int64_t width_of(int64_t count, int64_t i) { return std::min(kTileTokens, round_up(count - i, kLaneGroup)); }

  // The products' inner size is a multiple of kLaneGroup, which the last block's number of tokens need not be.
  void copy_retained(int64_t t, int64_t count, int64_t v, int64_t rows) {
    for (int64_t j = 0; j < rows; ++j) {
      const O* const from = retained_.block(t) + (first_ + v + j) * count;
      O* const to = operand_.data() + j * kBlockTokens;
      std::copy(from, from + count, to);
      std::fill(to + count, to + round_up(count, kLaneGroup), O{});
    }
  }

  // operand_ of the block's tokens against entries [v, v + rows) of the chunk.
  void recompute(int64_t count, int64_t v, int64_t rows) {
    float* const logits = logits_.data();
    const O* weight = weight_rows_.row(first_ + v, 0);
    for (int64_t j = 1; j < rows; ++j) weight_rows_.row(first_ + v + j, j);
    for (int64_t t = 0; t < count; t += kTileTokens) {
      const int64_t width = width_of(count, t);
      multiply({rows, width, size_, size_, width, width, false}, weight, columns_.data() + t * size_, logits);
      if (!problem_.transform.is_identity() || problem_.bias.defined()) {
        const float* bias = problem_.bias.defined() ? problem_.bias.const_data_ptr<float>() + first_ + v : nullptr;
        tiles_.transform(logits, rows, width, bias, problem_.transform);
      }
      for (int64_t i = 0; i < std::min(kTileTokens, count - t); ++i) {
        const int64_t row = targets_[t + i] - first_ - v;
        if (row >= 0 && row < rows) logits[row * width + i] = -std::numeric_limits<float>::infinity();
      }
      kernels_.gradient({logits, rows, width, exponents_.data() + t, of_operand_.data() + t, problem_.transform,
                         operand_.data() + t, kBlockTokens});
    }
  }

  // Where an entry is a token's target, its share is the one that counts: it is added in float32.
  void add_targets() {
    const auto before = [&](int64_t token, int64_t entry) { return problem_.target(token) < entry; };
    const auto begin = std::lower_bound(by_target_.begin(), by_target_.end(), first_, before);
    const auto end = std::lower_bound(begin, by_target_.end(), first_ + rows_, before);
    for (auto token = begin; token != end; ++token) {
      const int64_t entry = problem_.target(*token) - first_;
      const float factor = static_cast<float>(coefficients_[*token].of_target);
      bias_sum_[entry] += factor;
      if (!gradients_.weight.defined()) continue;
      float* const sum = sum_.data() + entry * stride_;
      with_element_type(problem_.hidden, [&](auto element) {
        using E = decltype(element);
        const E* h = problem_.hidden.const_data_ptr<E>() + problem_.rows()[*token] * size_;
        for (int64_t k = 0; k < size_; ++k) sum[k] += factor * static_cast<float>(h[k]);
      });
    }
  }

  void write() const {
    if (gradients_.weight.defined()) {
      with_element_type(gradients_.weight, [&](auto element) {
        using E = decltype(element);
        E* const out = gradients_.weight.mutable_data_ptr<E>() + first_ * size_;
        for (int64_t v = 0; v < rows_; ++v) {
          write_row(sum_.data() + v * stride_, size_, gradients_.adds_to_weight, out + v * size_);
        }
      });
    }
    if (gradients_.bias.defined()) {
      with_element_type(gradients_.bias, [&](auto element) {
        using E = decltype(element);
        E* const out = gradients_.bias.mutable_data_ptr<E>() + first_;
        write_row(bias_sum_.data(), rows_, gradients_.adds_to_bias, out);
      });
    }
  }

  template <typename E>
  static void write_row(const float* sum, int64_t size, bool adds, E* out) {
    for (int64_t k = 0; k < size; ++k) out[k] = static_cast<E>(adds ? static_cast<float>(out[k]) + sum[k] : sum[k]);
  }

  const TileKernels& tiles_ = *tile_kernels();
  const OperandKernels<O>& kernels_ = operand_kernels<O>(tiles_);
  const Problem<float>& problem_;
  const Retained<O>& retained_;
  const std::vector<RowCoefficients>& coefficients_;
  const std::vector<int64_t>& by_target_;
  const Gradients& gradients_;
  const int64_t size_, stride_, chunk_;
  const bool recomputes_;
  int64_t first_ = 0, rows_ = 0;
  OperandRows<O> hidden_rows_, weight_rows_;
  Buffer<O> hidden_;      // pack_rows
  Buffer<O> columns_;     // hidden^T, as in the forward
  Buffer<float> logits_;  // [entries, width]
  Buffer<O> operand_;     // [entries, kBlockTokens]
  Buffer<float> sum_;     // [chunk, stride]
  std::vector<float> bias_sum_;
  std::array<const O*, kBlockTokens> rows_of_block_;
  std::array<float, kBlockTokens> of_operand_, exponents_, ones_;
  std::array<int64_t, kBlockTokens> targets_;
};

template <typename O>
void run(const Problem<float>& problem, const at::Tensor& kept, const std::vector<RowCoefficients>& coefficients,
         const Gradients& gradients) {
  const Retained<O> retained(kept, problem.count(), problem.vocabulary());
  const std::vector<int64_t> by_target = tokens_by_target(problem);
  const int64_t chunk = chunk_of(problem.hidden_size());
  for_each_task((problem.vocabulary() + chunk - 1) / chunk,
                [&] { return WeightChunks<O>(problem, retained, coefficients, by_target, gradients); });
}

}  // namespace

void fused_weight_gradient(const Problem<float>& problem, at::ScalarType operand, const at::Tensor& retained,
                           const std::vector<RowCoefficients>& coefficients, const Gradients& gradients) {
  check_products(operand);
  operand == at::kBFloat16 ? run<Bf16Bits>(problem, retained, coefficients, gradients)
                           : run<float>(problem, retained, coefficients, gradients);
}

}  // namespace fastdpo::cpu
