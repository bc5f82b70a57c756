#include "exponentials.h"

#include <stdexcept>
#include <string>

namespace fastdpo::cuda {

#ifdef FASTDPO_NO_LEVEL1

const char* exponentials_missing() { return FASTDPO_NO_LEVEL1; }

void exponentials(const ExponentialsArguments&, void*) {
  throw std::runtime_error(std::string("fastdpo: built without Level 1: ") + exponentials_missing());
}

#else

// One instantiation of the kernel a file, in hopper/: a compiler needs gigabytes for each.
void exponentials_bf16_operand(const ExponentialsArguments& arguments, void* stream);
void exponentials_bf16_operand_extras(const ExponentialsArguments& arguments, void* stream);
void exponentials_bf16_sums(const ExponentialsArguments& arguments, void* stream);
void exponentials_bf16_sums_extras(const ExponentialsArguments& arguments, void* stream);
void exponentials_fp16_sums(const ExponentialsArguments& arguments, void* stream);

const char* exponentials_missing() { return nullptr; }

void exponentials(const ExponentialsArguments& arguments, void* stream) {
  const bool writes = arguments.operand != nullptr;
  if (arguments.type == Type::kBFloat16) {
    const auto kernel = writes ? (arguments.extras ? exponentials_bf16_operand_extras : exponentials_bf16_operand)
                               : (arguments.extras ? exponentials_bf16_sums_extras : exponentials_bf16_sums);
    kernel(arguments, stream);
  } else if (arguments.type == Type::kFloat16 && !writes && !arguments.extras) {
    exponentials_fp16_sums(arguments, stream);
  } else {
    throw std::runtime_error("fastdpo: exponentials of types that Level 1 has no kernel for");
  }
}

#endif

}  // namespace fastdpo::cuda
