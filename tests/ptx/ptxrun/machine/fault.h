// What the machine says when a kernel does what no device promises to forgive.
#pragma once

#include <stdexcept>
#include <string>

namespace ptx {

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace ptx
