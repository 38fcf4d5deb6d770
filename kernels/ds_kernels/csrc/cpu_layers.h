// What each instruction set's build of cpu_layers.cpp has.
#pragma once

#include <stdint.h>

#define DSK_MOST_LABELS 16

// Cross-entropy of `rows` rows of `width` logits against `labels` (at most DSK_MOST_LABELS) labels each, contiguous. With `gradient`
// the logits become the gradient of the summed loss.
typedef struct {
  void *logits;  // fp32 or bf16
  const int64_t *label;
  int64_t rows, width, labels, ignored;
  int32_t type, gradient;
} dsk_entropy;

#define DSK_DECLARE_LAYERS(isa) \
  namespace isa {               \
  double entropy(const dsk_entropy &e, int32_t threads);                              \
  }

DSK_DECLARE_LAYERS(plain)
#if defined(__x86_64__)
DSK_DECLARE_LAYERS(avx2)
DSK_DECLARE_LAYERS(avx512)
#endif
