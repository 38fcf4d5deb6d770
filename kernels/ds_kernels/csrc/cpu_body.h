// What each instruction set's build of cpu_body.cpp has.
#pragma once

#include "opt_math.h"

#define DSK_DECLARE(isa)                                                                        \
  namespace isa {                                                                               \
  void step(const dsk_tensor *tensors, int64_t count, const dsk_args *args, int32_t threads);   \
  double sum_of_squares(const dsk_tensor *tensors, int64_t count, int32_t threads);             \
  }

DSK_DECLARE(plain)
#if defined(__x86_64__)
DSK_DECLARE(avx2)
DSK_DECLARE(avx512)
#endif
