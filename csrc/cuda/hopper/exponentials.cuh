// Level 1's first product as a kernel: TMA into shared memory, wgmma from there, and exponential_tile.cuh on the
// accumulators. CUTLASS brings the main loop, the tile scheduler and the stores. sm_90a only.
#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <stdexcept>
#include <string>

#include "../exponentials.h"
#include "exponential_tile.cuh"

namespace fastdpo::cuda {

// Element is the type of hidden and weight. Without kWrites nothing of size [rows, columns] leaves the chip. kExtras is
// ExponentialsArguments' extras.
template <typename Element, bool kWrites, bool kExtras>
struct ExponentialsKernel {
  // Two warp groups with a tile of their own each: while one takes exponentials, the other multiplies (pingpong). 192
  // columns a tile: 53 bytes of operands a cycle come in at full rate, where 128 columns need 64, which is all that a
  // multiprocessor can take; 256 columns would leave no registers for the exponentials. Two blocks with neighbouring
  // rows share the weight's tile.
  using Tile = cute::Shape<cute::_128, cute::Int<kTileColumns>, cute::_64>;
  using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;
  using Out = cute::conditional_t<kWrites, cutlass::bfloat16_t, void>;
  using Visitor = ExponentialTile<128, kTileColumns, kExtras>;
  static constexpr int kAlignment = 16 / static_cast<int>(sizeof(Element));

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, cutlass::layout::RowMajor, kAlignment, Out,
      cutlass::layout::RowMajor, kAlignment, cutlass::epilogue::TmaWarpSpecialized, Visitor>::CollectiveOp;
  using MainLoop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, cutlass::layout::RowMajor, kAlignment, Element,
      cutlass::layout::ColumnMajor, kAlignment, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      cutlass::gemm::KernelTmaWarpSpecializedPingpong>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, MainLoop, Epilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static void run(const ExponentialsArguments& a, cudaStream_t stream) {
    typename Gemm::Arguments arguments{};
    arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    arguments.problem_shape = {static_cast<int>(a.rows), static_cast<int>(a.columns), static_cast<int>(a.depth), 1};
    arguments.mainloop.ptr_A = static_cast<const Element*>(a.hidden);
    arguments.mainloop.dA = {a.depth, {}, 0};
    arguments.mainloop.ptr_B = static_cast<const Element*>(a.weight);
    arguments.mainloop.dB = {a.depth, {}, 0};
    arguments.epilogue.thread = {a.slope,        a.exponents, a.exponent_stride,   a.targets,
                                 a.first_column, a.tile_sums, tiles_of(a.columns), a.rows};
    if constexpr (kWrites) {
      arguments.epilogue.ptr_D = static_cast<Out*>(a.operand);
      arguments.epilogue.dD = {a.operand_stride, {}, 0};
    }
    int device = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    arguments.hw_info.device_id = device;
    check(cudaDeviceGetAttribute(&arguments.hw_info.sm_count, cudaDevAttrMultiProcessorCount, device),
          "cudaDeviceGetAttribute");
    arguments.hw_info.sm_count &= ~1;  // clusters are pairs
    // Not Gemm::can_implement: it wants a multiple of 8 columns, where TMA wants row strides of 16 bytes alone. A tile
    // scheduler without split-K and this visitor need no memory of their own.
    Gemm gemm;
    const cutlass::Status status = Gemm::get_workspace_size(arguments) != 0 ? cutlass::Status::kErrorWorkspaceNull
                                                                            : gemm.run(arguments, nullptr, stream);
    if (status != cutlass::Status::kSuccess) {
      throw std::runtime_error("fastdpo: exponentials of " + std::to_string(a.rows) + " x " + std::to_string(a.depth) +
                               " by " + std::to_string(a.depth) + " x " + std::to_string(a.columns) +
                               " did not launch: " + cutlass::cutlassGetStatusString(status));
    }
  }

 private:
  static void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess)
      throw std::runtime_error(std::string("fastdpo: ") + what + ": " + cudaGetErrorString(error));
  }
};

}  // namespace fastdpo::cuda
