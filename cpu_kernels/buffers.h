// What the handlers say of buffers in their errors.
#pragma once

#include <string>

#include "xla/ffi/api/ffi.h"

namespace block_sparse {

inline std::string shape_of(const xla::ffi::AnyBuffer::Dimensions& dims) {
  std::string out = "[";
  for (size_t i = 0; i < dims.size(); ++i) out += (i ? ", " : "") + std::to_string(dims[i]);
  return out + "]";
}

}  // namespace block_sparse
