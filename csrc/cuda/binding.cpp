// Registers the ops for CUDA tensors, through the LibTorch stable ABI: one library file for every torch from 2.10 on
// and for every Python.
#include <torch/csrc/stable/library.h>

#include <exception>
#include <string>

#include "../fastdpo.h"
#include "exponentials.h"
#include "token_logps.h"

#ifndef FASTDPO_CUDA_ARCHS
#error "FASTDPO_CUDA_ARCHS must name the GPU architectures built for, as a string"
#endif
#ifndef FASTDPO_NVCC
#error "FASTDPO_NVCC must be nvcc's version, as a string"
#endif

STABLE_TORCH_LIBRARY_IMPL(fastdpo, CUDA, m) {
  m.impl("token_logps_forward", TORCH_BOX(&fastdpo::cuda::token_logps_forward));
  m.impl("token_logps_backward", TORCH_BOX(&fastdpo::cuda::token_logps_backward));
}

// The CPU library defines the schemas. Where it cannot be loaded, because it was built for another torch, this does.
// Returns 0, or 1 if torch refused (the schemas are there already). Calling it again changes nothing.
extern "C" __attribute__((visibility("default"))) int fastdpo_declare_ops() {
  using torch::stable::detail::StableLibrary;
  try {
    static const bool declared = [] {
      // Never destroyed: a schema stays as long as the process, as every op's does.
      auto* library = new StableLibrary(StableLibrary::Kind::FRAGMENT, "fastdpo", nullptr, __FILE__, __LINE__);
      library->def(fastdpo::kForwardSchema);
      library->def(fastdpo::kBackwardSchema);
      return true;
    }();
    return declared ? 0 : 1;
  } catch (const std::exception&) {
    return 1;  // an exception must not leave a C function
  }
}

// JSON; what fastdpo.build_info() shows of this library.
extern "C" __attribute__((visibility("default"))) const char* fastdpo_cuda_build_facts() {
  static const std::string facts = [] {
    const char* missing = fastdpo::cuda::exponentials_missing();
    const std::string level1 = missing == nullptr ? "built" : std::string("not built: ") + missing;
    return R"({"archs": ")" FASTDPO_CUDA_ARCHS R"(", "nvcc": ")" FASTDPO_NVCC
           R"(", "target_torch": "2.10", "level1": ")" +
           level1 + "\"}";
  }();
  return facts.c_str();
}
