#include "exponentials.cuh"

namespace fastdpo::cuda {

void exponentials_bf16_operand(const ExponentialsArguments& arguments, void* stream) {
  ExponentialsKernel<cutlass::bfloat16_t, true, false>::run(arguments, static_cast<cudaStream_t>(stream));
}

}  // namespace fastdpo::cuda
