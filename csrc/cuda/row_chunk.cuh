// From the row kernels' arguments as launch.h has them to what the kernels take.
#pragma once

#include "dispatch.cuh"
#include "row_kernel.cuh"

namespace fastdpo::cuda {

template <typename C, typename O>
RowChunk<C, O> row_chunk(const RowChunkArguments& a) {
  RowChunk<C, O> chunk{};
  chunk.logits = static_cast<const C*>(a.logits);
  chunk.logits_stride = a.logits_stride;
  chunk.operand = static_cast<O*>(a.operand);
  chunk.operand_stride = a.operand_stride;
  chunk.tensor_float32 = a.type == Type::kFloat16;
  chunk.retained = a.retained;
  chunk.first_column = a.first_column;
  chunk.columns = static_cast<int>(a.columns);
  chunk.bias = static_cast<const C*>(a.bias);
  chunk.targets = a.targets;
  chunk.ignore_index = a.ignore_index;
  chunk.transform = transform_in<C>(a.transform);
  return chunk;
}

}  // namespace fastdpo::cuda
