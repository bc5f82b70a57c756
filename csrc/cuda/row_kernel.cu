#include "row_chunk.cuh"

namespace fastdpo::cuda {
namespace {

template <typename C, typename O, RowPass kPass, bool kExtras>
void launch_row_kernel(const RowChunk<C, O>& chunk, int64_t count, void* stream) {
  using Traits = RowTraits<C, O, kPass, kExtras>;
  launch_kernel("row_kernel", row_kernel<Traits>, count, Traits::kThreads, stream, chunk);
}

// Calls `use` with Tags of the compute type and the operand type.
template <typename Use>
void with_operand(Type input, Use use) {
  switch (operand_type(input)) {
    case Type::kFloat64:
      return use(Tag<double>{}, Tag<double>{});
    case Type::kBFloat16:
      return use(Tag<float>{}, Tag<bfloat16>{});
    default:
      return use(Tag<float>{}, Tag<float>{});
  }
}

}  // namespace

void sum_chunk(const RowChunkArguments& arguments, void* sums, bool extras, void* direction, int64_t hidden_units,
               void* stream) {
  with_operand(arguments.type, [&](auto compute, auto operand) {
    using C = typename decltype(compute)::type;
    using O = typename decltype(operand)::type;
    static_assert(sizeof(RowSums<C>) == kRowSumsSize * sizeof(C));
    RowChunk<C, O> chunk = row_chunk<C, O>(arguments);
    chunk.sums = static_cast<RowSums<C>*>(sums);
    chunk.direction = static_cast<C*>(direction);
    chunk.hidden_units = hidden_units;
    if (arguments.operand == nullptr) {
      if (extras) {
        launch_row_kernel<C, O, RowPass::kSums, true>(chunk, arguments.count, stream);
      } else {
        launch_row_kernel<C, O, RowPass::kSums, false>(chunk, arguments.count, stream);
      }
    } else if (extras) {
      launch_row_kernel<C, O, RowPass::kSumsAndOperand, true>(chunk, arguments.count, stream);
    } else {
      launch_row_kernel<C, O, RowPass::kSumsAndOperand, false>(chunk, arguments.count, stream);
    }
  });
}

void recompute_operand(const RowChunkArguments& arguments, const int64_t* rows, const void* row_state,
                       int64_t positions, void* stream) {
  with_operand(arguments.type, [&](auto compute, auto operand) {
    using C = typename decltype(compute)::type;
    using O = typename decltype(operand)::type;
    RowChunk<C, O> chunk = row_chunk<C, O>(arguments);
    chunk.rows = rows;
    chunk.row_state = static_cast<const C*>(row_state);
    chunk.state_stride = positions;
    launch_row_kernel<C, O, RowPass::kOperand, false>(chunk, arguments.count, stream);
  });
}

}  // namespace fastdpo::cuda
