#include "exponentials.cuh"

namespace fastdpo::cuda {

void exponentials_bf16_sums(const ExponentialsArguments& arguments, void* stream) {
  ExponentialsKernel<cutlass::bfloat16_t, false, false>::run(arguments, static_cast<cudaStream_t>(stream));
}

}  // namespace fastdpo::cuda
