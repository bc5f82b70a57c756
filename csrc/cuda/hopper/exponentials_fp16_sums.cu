#include "exponentials.cuh"

namespace fastdpo::cuda {

void exponentials_fp16_sums(const ExponentialsArguments& arguments, void* stream) {
  ExponentialsKernel<cutlass::half_t, false, false>::run(arguments, static_cast<cudaStream_t>(stream));
}

}  // namespace fastdpo::cuda
