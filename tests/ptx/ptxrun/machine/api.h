// The machine as the stand-in CUDA runtime sees it.
#pragma once

#include "machine.h"

namespace ptx {

Machine& the_machine();

// Runs a kernel by its name. What is wrong with it is kept in last_fault(), and the launch fails, as a device's would.
bool launch_by_name(const char* name, const Dim& grid, const Dim& block, const Dim& cluster, uint64_t dynamic_shared,
                    void** arguments);
const std::string& last_fault();
void set_fault(const std::string& text);

}  // namespace ptx
