// The CUDA ops for CPU tensors, as fastdpo_host::token_logps_forward and _backward, and what the tests may set.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <utility>

#include "../../csrc/fastdpo.h"
#include "blocks.h"
#include "runtime_host.h"
#include "token_logps.h"

namespace {

void capture(bool capturing) { fastdpo::cuda::host_settings().capturing = capturing; }

// As if what ran on the device before had failed.
void fail(bool failed) { fastdpo::cuda::host_settings().device_failed = failed; }

void pretend(int64_t compute_capability, bool has_level1) {
  auto& settings = fastdpo::cuda::host_settings();
  settings.compute_capability = static_cast<int>(compute_capability);
  settings.has_level1 = has_level1;
}

// choose_blocks() of a case whose scratch memory is so many bytes for a row, an entry and a column.
std::tuple<int64_t, int64_t> choose_blocks(int64_t pass, int64_t level, int64_t rows, int64_t vocabulary,
                                           int64_t hidden_units, int64_t multiprocessors, int64_t row_bytes,
                                           int64_t entry_bytes, int64_t column_bytes) {
  const fastdpo::cuda::Blocks blocks = fastdpo::cuda::choose_blocks(
      {.pass = static_cast<fastdpo::cuda::Pass>(pass),
       .level = static_cast<fastdpo::cuda::Level>(level),
       .rows = rows,
       .vocabulary = vocabulary,
       .hidden_units = hidden_units,
       .multiprocessors = static_cast<int>(multiprocessors),
       .row_bytes = row_bytes,
       .column_bytes = [&](int64_t of_rows) { return of_rows * entry_bytes + column_bytes; }});
  return {blocks.rows, blocks.columns};
}

int64_t fused_products() { return std::exchange(fastdpo::cuda::host_settings().fused_products, 0); }

}  // namespace

STABLE_TORCH_LIBRARY(fastdpo_host, m) {
  m.def(fastdpo::kForwardSchema);
  m.def(fastdpo::kBackwardSchema);
  m.def("capture(bool capturing) -> ()");
  m.def("fail(bool failed) -> ()");
  m.def("pretend(int compute_capability, bool has_level1) -> ()");
  m.def("fused_products() -> int");  // since the last time
  m.def(
      "choose_blocks(int which_pass, int level, int rows, int vocabulary, int hidden_units, int multiprocessors, "
      "int row_bytes, int entry_bytes, int column_bytes) -> (int, int)");
}

STABLE_TORCH_LIBRARY_IMPL(fastdpo_host, CPU, m) {
  m.impl("token_logps_forward", TORCH_BOX(&fastdpo::cuda::token_logps_forward));
  m.impl("token_logps_backward", TORCH_BOX(&fastdpo::cuda::token_logps_backward));
}

STABLE_TORCH_LIBRARY_IMPL(fastdpo_host, CompositeExplicitAutograd, m) {
  m.impl("capture", TORCH_BOX(&capture));
  m.impl("fail", TORCH_BOX(&fail));
  m.impl("pretend", TORCH_BOX(&pretend));
  m.impl("fused_products", TORCH_BOX(&fused_products));
  m.impl("choose_blocks", TORCH_BOX(&choose_blocks));
}
