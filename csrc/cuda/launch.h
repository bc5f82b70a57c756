// The kernels as plain C++ functions: device pointers, 64-bit sizes and a stream. Free of torch and of CUDA headers.
//
// Every function queues its work on `stream` and returns; it throws std::runtime_error if a launch is refused. The
// layout of what each pointer leads to stands beside the kernel, in the .cuh files.
#pragma once

#include <cstdint>

namespace fastdpo::cuda {

enum class Type : int { kFloat32, kFloat64, kFloat16, kBFloat16 };

constexpr int64_t size_of(Type type) { return type == Type::kFloat64 ? 8 : type == Type::kFloat32 ? 4 : 2; }
// See csrc/fastdpo.h for the compute type C and the operand type O.
constexpr Type compute_type(Type input) { return input == Type::kFloat64 ? Type::kFloat64 : Type::kFloat32; }
constexpr Type operand_type(Type input) { return input == Type::kFloat16 ? Type::kFloat32 : input; }

// Strides of the row kernel's logits and operand must be alike modulo this many elements, which are a 16-byte access of
// the narrowest operand: both then meet 16-byte boundaries in the same columns, also where V is odd.
constexpr int64_t kRowAlignment = 8;

// As many numbers of the compute type as one row's running sums are, and which of them is the exponent.
constexpr int64_t kRowSumsSize = 7;
constexpr int64_t kExponentInRowSums = 1;
// As many int64 as struct TargetFacts has: scored, bad_position, bad_target.
constexpr int64_t kTargetFactsSize = 3;

struct Transform {
  double scale;
  double softcap;
  double inv_temperature;
};

void partition_rows(const int64_t* targets, int64_t count, int64_t ignore_index, int64_t vocabulary, int64_t* rows,
                    int64_t* facts, void* stream);

void gather_rows(const void* from, const int64_t* rows, int64_t count, int64_t row_bytes, void* to, void* stream);

struct StartRowsArguments {
  Type type;
  const void* hidden;
  const void* weight;
  const void* bias;  // compute type, or null
  const int64_t* targets;
  const int64_t* rows;  // or null
  int64_t count;
  int64_t hidden_units;
  int64_t vocabulary;
  int64_t ignore_index;
  Transform transform;
  void* sums;
  int64_t* row_targets;
};
void start_rows(const StartRowsArguments& arguments, void* stream);

struct RowChunkArguments {
  Type type;  // the inputs' type
  int64_t count;
  const void* logits;
  int64_t logits_stride;
  void* operand;  // or null: forward without a gradient
  int64_t operand_stride;
  bool retained;
  int64_t first_column;
  int64_t columns;
  const void* bias;  // compute type, at the chunk's first column, or null
  const int64_t* targets;
  int64_t ignore_index;
  Transform transform;
};
// Forward: adds the chunk to the sums, and writes the operand if there is one.
void sum_chunk(const RowChunkArguments& arguments, void* sums, bool extras, void* direction, int64_t hidden_units,
               void* stream);
// Backward: writes the operand again, the target's term in its column.
void recompute_operand(const RowChunkArguments& arguments, const int64_t* rows, const void* row_state,
                       int64_t positions, void* stream);

// Level 1, after exponentials() (exponentials.h) wrote the chunk's operand, if there is one, and its tile sums; logits
// is not used. Forward: the tile sums become part of the sums, and rows whose exponent is too low are put right. What
// the earlier chunks' products have made of `direction` shrinks with them.
void settle_rows(const RowChunkArguments& arguments, const float* tile_sums, bool extras, const void* hidden,
                 const void* weight, void* sums, void* direction, int64_t hidden_units, void* stream);
// Backward: puts the target's term in its column. Arguments as recompute_operand's.
void place_targets(const RowChunkArguments& arguments, const int64_t* rows, const void* row_state, int64_t positions,
                   void* stream);

struct ResultPointers {
  void* logps;
  void* row_state;
  void* direction;  // or null, as what follows
  void* entropy;
  void* log_sum_sq_probs;
  void* mean_logits;
  void* top_gap;
  int64_t positions;
  int64_t hidden_units;
};

struct FinishRowsArguments {
  Type type;
  const void* sums;
  const int64_t* targets;
  const int64_t* rows;  // or null
  int64_t first_position;
  int64_t count;
  int64_t ignore_index;
  int64_t vocabulary;
  const void* weight;
  const void* accumulated;  // or null without a direction
  void* retained;           // or null
  Transform transform;
  ResultPointers results;
};
void finish_rows(const FinishRowsArguments& arguments, void* stream);

// Results of `count` rows that are not computed: 0 where ignored, else NaN.
void fill_rows(Type type, const int64_t* targets, int64_t ignore_index, const int64_t* rows, int64_t count,
               const ResultPointers& results, void* stream);

struct ScaleRowsArguments {
  Type type;
  const void* grad_logps;
  const void* hidden;
  const int64_t* targets;
  const int64_t* rows;  // or null
  const void* row_state;
  int64_t count;
  int64_t positions;
  int64_t hidden_units;
  int64_t ignore_index;
  double slope;
  void* scaled;        // or null
  void* coefficients;  // or null
};
void scale_rows(const ScaleRowsArguments& arguments, void* stream);

void scale_direction(Type type, const void* grad_logps, const void* direction, const int64_t* targets,
                     int64_t ignore_index, int64_t positions, int64_t hidden_units, void* grad_hidden, void* stream);

// Between any two of the types; equal ones make a copy.
void convert(const void* from, Type from_type, void* to, Type to_type, int64_t count, void* stream);

}  // namespace fastdpo::cuda
