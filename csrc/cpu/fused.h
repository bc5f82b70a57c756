// The ops without whole products: a tile of logits is computed, exponentiated and used by the gradient's product while
// it is in cache. What forward and backward share: the tiles, the products, and where retained exponentials lie.
//
// Tiles have entries of the vocabulary in rows and tokens in lanes (tile_kernels.h), so that the weight is read as it
// lies, and every product's result is the next one's operand:
//   logits     [entries, tokens] = weight * hidden^T           hidden^T is packed once per block of tokens
//   direction  [tokens, H]      += operand^T * weight          operand^T leaves the registers transposed
//   grad_weight [entries, H]    += operand * hidden
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <optional>

#include "backward_rows.h"
#include "forward_rows.h"
#include "huge_pages.h"
#include "problem.h"
#include "tile_kernels.h"

namespace fastdpo::cpu {

// A block of tokens visits the whole weight at a time: so many tokens that packing and streaming the weight cost little
// beside the products, so few that the block's direction stays in cache. Also the unit in which exponentials are kept.
constexpr int64_t kBlockTokens = 256;
// Tokens in a tile, at most.
constexpr int64_t kTileTokens = kPanel;
static_assert(kBlockTokens % kTileTokens == 0 && kTileTokens % kLaneGroup == 0);

constexpr int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Entries in a tile: its rows of the weight, their packed copy and the tile itself share the second-level cache.
constexpr int64_t kTileEntries = 128;

// The type of the products' operands for these inputs: bfloat16 or float32; nullopt where the fused kernels do not run.
// The same for the whole life of the process: a backward must find what its forward left.
std::optional<at::ScalarType> fused_operand(const at::Tensor& hidden);

// Raises where products with such operands have been switched off since.
void check_products(at::ScalarType operand);

// result (+)= a * b in float32; a is [m, k], b [k, n]. bfloat16's b is interleaved (OperandLayout), and k even.
struct Product {
  int64_t m, n, k;
  int64_t a_stride, b_stride, result_stride;
  bool add;
};
void multiply(const Product& product, const float* a, const float* b, float* result);
void multiply(const Product& product, const Bf16Bits* a, const Bf16Bits* b, float* result);

// result [m, round_up(H, kPanel)] (+)= a [m, k] * b [k, H], b as OperandKernels::pack_rows makes it, or, in float32,
// rows.
void multiply_rows(int64_t m, int64_t k, int64_t hidden_size, const float* a, int64_t a_stride, const float* b,
                   float* result, bool add);
void multiply_rows(int64_t m, int64_t k, int64_t hidden_size, const Bf16Bits* a, int64_t a_stride, const Bf16Bits* b,
                   float* result, bool add);

// The number of elements that pack_rows writes.
template <typename O>
int64_t packed_rows_size(int64_t rows, int64_t hidden_size) {
  return round_up(rows, OperandLayout<O>::kRowsPad) * round_up(hidden_size, kPanel);
}

// The matrix units keep a state per thread; a thread that has multiplied should end with this.
struct MatrixUnits {
  MatrixUnits() = default;
  MatrixUnits(const MatrixUnits&) = delete;
  MatrixUnits& operator=(const MatrixUnits&) = delete;
  ~MatrixUnits();
};

// Uninitialised memory, aligned for any vector.
template <typename E>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : bytes_(at::empty({size * static_cast<int64_t>(sizeof(E))}, at::kByte)),
        data_(static_cast<E*>(bytes_.mutable_data_ptr())) {
    prefer_huge_pages(bytes_);
  }
  E* data() const { return data_; }

 private:
  at::Tensor bytes_;
  E* data_;
};

// Rows of a 16- or 32-bit tensor in the operand type: where they lie, or widened into a buffer.
template <typename O>
class OperandRows {
 public:
  OperandRows(const at::Tensor& tensor, int64_t most_rows)
      : tensor_(tensor),
        size_(tensor.size(1)),
        bytes_(static_cast<const char*>(tensor.const_data_ptr())),
        converts_(tensor.element_size() != sizeof(O)),
        buffer_(converts_ ? most_rows * size_ : 0) {}

  // Row i of the tensor; where it is widened it becomes row `slot` of the buffer, whose rows are contiguous.
  const O* row(int64_t i, int64_t slot) const {
    const char* const source = bytes_ + i * size_ * tensor_.element_size();
    if constexpr (std::is_same_v<O, float>) {
      if (converts_) {
        float* const to = buffer_.data() + slot * size_;
        const auto widen = tensor_.scalar_type() == at::kHalf ? tile_kernels()->widen_f16 : tile_kernels()->widen_bf16;
        widen(reinterpret_cast<const uint16_t*>(source), to, size_);
        return to;
      }
    }
    return reinterpret_cast<const O*>(source);
  }

 private:
  const at::Tensor& tensor_;
  int64_t size_;
  const char* bytes_;
  bool converts_;
  Buffer<O> buffer_;
};

// Exponentials kept from forward to backward: blocks of kBlockTokens tokens, each [V, its width]. A tile of tokens is
// kept as a whole or not at all.
template <typename O>
class Retained {
 public:
  Retained(const at::Tensor& tensor, int64_t scored, int64_t vocabulary)
      : data_(static_cast<O*>(tensor.numel() > 0 ? tensor.data_ptr() : nullptr)), vocabulary_(vocabulary) {
    // The tensor may be of a narrower type than the operand: then it holds fewer tokens.
    const int64_t fit = tensor.numel() * tensor.element_size() / static_cast<int64_t>(sizeof(O)) / vocabulary;
    tokens_ = scored <= fit ? scored : fit / kTileTokens * kTileTokens;
  }

  // The first so many scored tokens are kept.
  int64_t tokens() const { return tokens_; }
  int64_t elements() const { return tokens_ * vocabulary_; }
  // Of the block that begins at a token: entries lie this far apart.
  int64_t stride(int64_t block) const { return std::min(kBlockTokens, tokens_ - block); }
  O* block(int64_t block) const { return data_ + block * vocabulary_; }

 private:
  O* data_;
  int64_t vocabulary_;
  int64_t tokens_;
};

// Numbers below the least normal one are taken for 0 while this lives: products of exponentials near exp(-87) are, and
// a processor spends a hundred times as long on them.
class FlushSubnormals {
 public:
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;
#if defined(__x86_64__)
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | kFlushToZero | kSubnormalsAreZero); }
  ~FlushSubnormals() { _mm_setcsr(before_); }

 private:
  static constexpr unsigned kFlushToZero = 0x8000, kSubnormalsAreZero = 0x0040;
  unsigned before_;
#else
  FlushSubnormals() {}
#endif
};

// Makes this thread's stores that went around the caches visible before whatever tells others that it is done.
inline void publish_stores() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Calls run(task) of a state for every task in [0, count), on as many threads as there are, each taking the next task
// when it is done: a thread that is held up does not hold up the others. make_state() is called once per thread.
template <typename MakeState>
void for_each_task(int64_t count, const MakeState& make_state) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(count, at::get_num_threads());
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const MatrixUnits units;
    const FlushSubnormals flush;
    auto state = make_state();
    for (int64_t task = next++; task < count; task = next++) state.run(task);
    publish_stores();
  });
}

// Fills what the forward returns; results.retained in Retained's layout.
void fused_forward(const Problem<float>& problem, at::ScalarType operand, Results<float>& results);

// weight's and bias's gradients from what fused_forward returned.
void fused_weight_gradient(const Problem<float>& problem, at::ScalarType operand, const at::Tensor& retained,
                           const std::vector<RowCoefficients>& coefficients, const Gradients& gradients);

}  // namespace fastdpo::cpu
