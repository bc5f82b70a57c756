// token_logps_forward in tiles: each block of tokens visits the vocabulary once (the arithmetic: ../fastdpo.h).
#include <ATen/Parallel.h>

#include <array>
#include <limits>
#include <vector>

#include "fused.h"

namespace fastdpo::cpu {
namespace {

template <typename O>
class ForwardBlocks {
 public:
  ForwardBlocks(const Problem<float>& problem, Results<float>& results, const Retained<O>& retained,
                int64_t block_tokens, int64_t tile_tokens)
      : problem_(problem),
        results_(results),
        retained_(retained),
        block_tokens_(block_tokens),
        tile_tokens_(tile_tokens),
        size_(problem.hidden_size()),
        stride_(round_up(size_, kPanel)),
        need_direction_(results.direction.numel() > 0),
        need_entropy_(results.entropy.numel() > 0),
        need_squares_(results.log_sum_sq_probs.numel() > 0),
        need_mean_(results.mean_logits.numel() > 0),
        hidden_rows_(problem.hidden, kTileTokens),
        weight_rows_(problem.weight, kTileEntries),
        columns_(block_tokens * size_),
        logits_(kTileEntries * kTileTokens),
        by_token_(need_direction_ ? block_tokens * kTileEntries : 0),
        packed_weight_(need_direction_ && kPacksWeight ? packed_rows_size<O>(kTileEntries, size_) : 0),
        direction_(need_direction_ ? block_tokens * stride_ : 0),
        sums_(block_tokens),
        exponents_(block_tokens),
        targets_(block_tokens),
        weight_pointers_(kTileEntries) {}

  // Scored tokens [task * block_tokens, ...).
  void run(int64_t task) {
    begin_ = task * block_tokens_;
    count_ = std::min(block_tokens_, problem_.count() - begin_);
    pack_hidden();
    for (int64_t v = 0; v < problem_.vocabulary(); v += kTileEntries) {
      const int64_t rows = std::min(kTileEntries, problem_.vocabulary() - v);
      for (int64_t j = 0; j < rows; ++j) weight_pointers_[j] = weight_rows_.row(v + j, j);
      for (int64_t t = 0; t < count_; t += tile_tokens_) add_tile(t, v, rows);
      if (need_direction_) add_direction(v, rows);
    }
    finish();
  }

 private:
  // float32's operand is read as the weight lies.
  static constexpr bool kPacksWeight = OperandLayout<O>::kPair > 1;

  int64_t count_of(int64_t t) const { return std::min(tile_tokens_, count_ - t); }
  int64_t width_of(int64_t t) const { return round_up(count_of(t), kLaneGroup); }

  void pack_hidden() {
    std::array<const O*, kTileTokens> rows;
    for (int64_t t = 0; t < count_; t += tile_tokens_) {
      const int64_t count = count_of(t);
      for (int64_t i = 0; i < count; ++i) rows[i] = hidden_rows_.row(problem_.rows()[begin_ + t + i], i);
      kernels_.pack_columns(rows.data(), count, size_, width_of(t), columns_.data() + t * size_);
    }
    std::fill(exponents_.begin(), exponents_.end(), 0.0f);
    for (int64_t i = 0; i < count_; ++i) {
      sums_[i] = start_row(problem_, begin_ + i);
      exponents_[i] = static_cast<float>(sums_[i].exponent);
      targets_[i] = problem_.target(begin_ + i);
    }
  }

  // Tokens [t, t + width) of the block against entries [v, v + rows).
  void add_tile(int64_t t, int64_t v, int64_t rows) {
    const int64_t width = width_of(t), count = count_of(t);
    float* const logits = logits_.data();
    multiply({rows, width, size_, size_, width, width, false}, weight_pointers_[0], columns_.data() + t * size_,
             logits);
    if (!problem_.transform.is_identity() || problem_.bias.defined()) {
      const float* bias = problem_.bias.defined() ? problem_.bias.const_data_ptr<float>() + v : nullptr;
      tiles_.transform(logits, rows, width, bias, problem_.transform);
    }
    alignas(64) std::array<float, kTileTokens> lanes;
    if (need_mean_) {
      set_targets(logits, t, v, rows, width, 0.0f);
      tiles_.lane_sum(logits, rows, width, lanes.data());
      for (int64_t i = 0; i < count; ++i) sums_[t + i].logit_sum += lanes[i];
    }
    set_targets(logits, t, v, rows, width, -std::numeric_limits<float>::infinity());
    tiles_.lane_max(logits, rows, width, lanes.data());
    for (int64_t i = 0; i < count; ++i) {
      RowSums<double>& sums = sums_[t + i];
      sums.max_logit = std::max(sums.max_logit, static_cast<double>(lanes[i]));
      if (lanes[i] - sums.exponent > kMaxExponentGap) raise(t + i, v, lanes[i]);
    }
    add_exponentials(t, rows, v, width, count);
  }

  void set_targets(float* logits, int64_t t, int64_t v, int64_t rows, int64_t width, float value) const {
    for (int64_t i = 0; i < count_of(t); ++i) {
      const int64_t row = targets_[t + i] - v;
      if (row >= 0 && row < rows) logits[row * width + i] = value;
    }
  }

  void add_exponentials(int64_t t, int64_t rows, int64_t v, int64_t width, int64_t count) {
    alignas(64) std::array<float, kTileTokens> sum, weighted, squares;
    ExponentialTile<O> tile{};
    tile.logits = logits_.data();
    tile.rows = rows;
    tile.width = width;
    tile.exponent = exponents_.data() + t;
    tile.transform = problem_.transform;
    if (need_direction_) {
      tile.by_token = by_token_.data() + t * kTileEntries;
      tile.by_token_stride = kTileEntries;
      tile.padded_rows = round_up(rows, kLaneGroup);
    }
    if (is_retained(t)) {
      tile.by_entry = retained_entry(t, v);
      tile.by_entry_stride = retained_stride(t);
      tile.by_entry_width = count;
    }
    tile.sum = sum.data();
    if (need_entropy_) tile.weighted = weighted.data();
    if (need_squares_) tile.squares = squares.data();
    kernels_.exponentials(tile);
    for (int64_t i = 0; i < count; ++i) {
      sums_[t + i].sum += sum[i];
      if (need_entropy_) sums_[t + i].weighted_sum += weighted[i];
      if (need_squares_) sums_[t + i].square_sum += squares[i];
    }
  }

  bool is_retained(int64_t t) const { return begin_ + t < retained_.tokens(); }
  int64_t retained_stride(int64_t t) const { return retained_.stride((begin_ + t) / kBlockTokens * kBlockTokens); }
  O* retained_entry(int64_t t, int64_t v) const {
    const int64_t block = (begin_ + t) / kBlockTokens * kBlockTokens;
    return retained_.block(block) + v * retained_.stride(block) + (begin_ + t - block);
  }

  // Raises token t's exponent; entries [0, v) have been added with the old one.
  void raise(int64_t t, int64_t v, double exponent) {
    const double factor = sums_[t].raise(exponent);
    exponents_[t] = static_cast<float>(exponent);
    if (v == 0) return;
    if (need_direction_) {
      float* const row = direction_.data() + t * stride_;
      for (int64_t k = 0; k < size_; ++k) row[k] = static_cast<float>(row[k] * factor);
    }
    if (is_retained(t)) kernels_.scale_column(retained_entry(t, 0), retained_stride(t), v, factor);
  }

  void add_direction(int64_t v, int64_t rows) {
    const O* operand = weight_pointers_[0];
    if constexpr (kPacksWeight) {
      kernels_.pack_rows(weight_pointers_.data(), nullptr, rows, size_, packed_weight_.data());
      operand = packed_weight_.data();
    }
    multiply_rows(round_up(count_, kLaneGroup), rows, size_, by_token_.data(), kTileEntries, operand, direction_.data(),
                  v > 0);
  }

  void finish() {
    for (int64_t i = 0; i < count_; ++i) {
      results_.write(problem_, begin_ + i, sums_[i]);
      if (!need_direction_) continue;
      float* const direction = results_.direction.mutable_data_ptr<float>() + problem_.rows()[begin_ + i] * size_;
      finish_direction(problem_, begin_ + i, sums_[i], direction_.data() + i * stride_, direction);
    }
  }

  const TileKernels& tiles_ = *tile_kernels();
  const OperandKernels<O>& kernels_ = operand_kernels<O>(tiles_);
  const Problem<float>& problem_;
  Results<float>& results_;
  const Retained<O>& retained_;
  const int64_t block_tokens_, tile_tokens_, size_, stride_;
  const bool need_direction_, need_entropy_, need_squares_, need_mean_;
  int64_t begin_ = 0, count_ = 0;
  OperandRows<O> hidden_rows_, weight_rows_;
  Buffer<O> columns_;        // hidden^T: for each tile of tokens [H / kPair, width, kPair]
  Buffer<float> logits_;     // [entries, width]
  Buffer<O> by_token_;       // operand^T: [tokens, entries]
  Buffer<O> packed_weight_;  // pack_rows
  Buffer<float> direction_;  // [tokens, stride]: the sum over j of operand_j w_j
  std::vector<RowSums<double>> sums_;
  std::vector<float> exponents_;
  std::vector<int64_t> targets_;
  std::vector<const O*> weight_pointers_;
};

// Tokens in a tile: few make an even number of tiles that are much alike, for threads to share. A function of the call
// and not of the threads, and so are the products' bits.
template <typename O>
int64_t tile_tokens(const Problem<float>& problem, const Retained<O>& retained) {
  const int64_t count = problem.count();
  const bool keeps_some = retained.tokens() > 0 && retained.tokens() < count;
  if (count == 0 || count > kBlockTokens || keeps_some) return kTileTokens;
  const int64_t tiles = round_up(count, 2 * kTileTokens) / kTileTokens;
  return round_up((count + tiles - 1) / tiles, kLaneGroup);
}

template <typename O>
void run(const Problem<float>& problem, Results<float>& results) {
  const Retained<O> retained(results.retained, problem.count(), problem.vocabulary());
  // What is not used is set, so that a call's results are a function of its inputs.
  char* const bytes = static_cast<char*>(results.retained.data_ptr());
  const int64_t used = retained.elements() * static_cast<int64_t>(sizeof(O));
  std::fill(bytes + used, bytes + results.retained.numel() * results.retained.element_size(), 0);
  // Few tokens are spread over all threads. A token's arithmetic is the same whatever block it is in.
  const int64_t tile = tile_tokens(problem, retained);
  const int64_t share = round_up((problem.count() + at::get_num_threads() - 1) / at::get_num_threads(), tile);
  const int64_t block = std::clamp(share, tile, kBlockTokens);
  for_each_task((problem.count() + block - 1) / block,
                [&] { return ForwardBlocks<O>(problem, results, retained, block, tile); });
}

}  // namespace

void fused_forward(const Problem<float>& problem, at::ScalarType operand, Results<float>& results) {
  check_products(operand);
  operand == at::kBFloat16 ? run<Bf16Bits>(problem, results) : run<float>(problem, results);
}

}  // namespace fastdpo::cpu
