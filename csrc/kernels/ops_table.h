// The kernels behind torch.ops.e3.*, compiled once an instruction set; one table of them is chosen at load.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels/isa.h"

namespace e3 {

struct OpsTable {
  Isa isa;
};

// Defined by ops_table.cpp, in one object an instruction set.
namespace baseline { extern const OpsTable table; }
#if defined(__x86_64__)
namespace avx2 { extern const OpsTable table; }
namespace avx512 { extern const OpsTable table; }
namespace avx512_bf16 { extern const OpsTable table; }
#endif

// The table of `isa`, or null where this build does not hold it.
inline const OpsTable* table_of(Isa isa) {
  switch (isa) {
    case Isa::baseline: return &baseline::table;
#if defined(__x86_64__)
    case Isa::avx2: return &avx2::table;
    case Isa::avx512: return &avx512::table;
    case Isa::avx512_bf16: return &avx512_bf16::table;
#endif
    default: return nullptr;
  }
}

// The widest table that this machine runs; the environment's E3_ISA asks for a narrower one.
inline const OpsTable& choose_table() {
  const Isa widest = detect_isa();
  const char* wanted = std::getenv("E3_ISA");
  if (wanted == nullptr || *wanted == '\0') return *table_of(widest);
  for (int isa = 0; isa <= static_cast<int>(widest); ++isa) {
    if (std::string(kIsaNames[isa]) == wanted) return *table_of(static_cast<Isa>(isa));
  }
  throw std::invalid_argument(std::string("E3_ISA=") + wanted + ": this machine runs baseline to " +
                              kIsaNames[static_cast<int>(widest)]);
}

}  // namespace e3
