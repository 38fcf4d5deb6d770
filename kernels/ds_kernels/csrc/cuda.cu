// The C ABI of the CUDA build: launches on the stream that is given as an integer, and returns cudaGetLastError().
#include <cuda_runtime.h>

#include "kernels.cuh"

#ifndef DSK_LAUNCH  // the tests launch on the CPU
#define DSK_LAUNCH(kernel, blocks, threads, stream, ...) kernel<<<blocks, threads, 0, stream>>>(__VA_ARGS__)
#endif

namespace {

constexpr int64_t kBlocks = 2048;  // enough for any device; more work strides

unsigned blocks_for(int64_t pieces) { return static_cast<unsigned>(pieces < 1 ? 1 : pieces < kBlocks ? pieces : kBlocks); }

cudaStream_t stream_of(uint64_t number) { return reinterpret_cast<cudaStream_t>(number); }

template <int RULE, int DECAY>
void launch(const dsk_tensor *tensor, const dsk_tensor *list, const int64_t *chunks, int64_t count, int64_t all_chunks,
            const dsk_call &call, cudaStream_t stream) {
  if (list) {
    auto kernel = dsk_list<RULE, DECAY>;
    DSK_LAUNCH(kernel, blocks_for(all_chunks), kThreads, stream, list, chunks, count, call);
  } else {
    auto kernel = dsk_flat<RULE, DECAY>;
    int64_t pieces = (tensor->n + kThreads * kVector - 1) / (kThreads * kVector);
    DSK_LAUNCH(kernel, blocks_for(pieces), kThreads, stream, *tensor, call);
  }
}

int step(const dsk_tensor *tensor, const dsk_tensor *list, const int64_t *chunks, int64_t count, int64_t all_chunks,
         const dsk_args *args, const dsk_args *on_device, const int32_t *skip, uint64_t stream) {
  dsk_call call = {*args, on_device, skip};
  auto run = args->rule == DSK_ADAGRAD          ? (args->decay_kind == DSK_L2 ? launch<DSK_ADAGRAD, DSK_L2>
                                                                              : launch<DSK_ADAGRAD, DSK_NONE>)
             : args->decay_kind == DSK_L2        ? launch<DSK_ADAM, DSK_L2>
             : args->decay_kind == DSK_DECOUPLED ? launch<DSK_ADAM, DSK_DECOUPLED>
                                                 : launch<DSK_ADAM, DSK_NONE>;
  run(tensor, list, chunks, count, all_chunks, call, stream_of(stream));
  return static_cast<int>(cudaGetLastError());
}

template <class... Kernels>
cudaError_t load(Kernels... kernels) {
  cudaFuncAttributes attributes;
  cudaError_t error = cudaSuccess;
  ((error = error == cudaSuccess ? cudaFuncGetAttributes(&attributes, kernels) : error), ...);
  return error;
}

template <int RULE, int DECAY>
cudaError_t load_rule() {
  return load(dsk_flat<RULE, DECAY>, dsk_list<RULE, DECAY>);
}

}  // namespace

extern "C" {

// 0 where the library can launch on the device of this number, which becomes the thread's, else an error of CUDA.
int dsk_cuda_use(int32_t device) { return static_cast<int>(cudaSetDevice(device)); }

// The same, with all kernels brought to the device now: later it might be in the middle of a capture.
int dsk_cuda_load(int32_t device) {
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = load_rule<DSK_ADAM, DSK_NONE>();
  if (error == cudaSuccess) error = load_rule<DSK_ADAM, DSK_L2>();
  if (error == cudaSuccess) error = load_rule<DSK_ADAM, DSK_DECOUPLED>();
  if (error == cudaSuccess) error = load_rule<DSK_ADAGRAD, DSK_NONE>();
  if (error == cudaSuccess) error = load_rule<DSK_ADAGRAD, DSK_L2>();
  if (error == cudaSuccess) error = load(dsk_prepare, dsk_squares, dsk_total);
  return static_cast<int>(error);
}

const char *dsk_cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

void dsk_cuda_arguments(const dsk_rates *rates, double step, double factor, dsk_args *args) {
  *args = dsk_arguments(*rates, rates->lr, step, factor);
}

// The arguments of the next step, made where its count lies: `step` to `args` are on the device.
int dsk_cuda_prepare(const dsk_rates *rates, float *step, const float *lr, const float *factor, const int32_t *skip,
                     dsk_args *args, uint64_t stream) {
  DSK_LAUNCH(dsk_prepare, 1, 1, stream_of(stream), *rates, step, lr, factor, skip, args);
  return static_cast<int>(cudaGetLastError());
}

// One tensor, described on the host. Rule and kind of decay are read from `args`, all else from `on_device` if given.
int dsk_cuda_step(const dsk_tensor *tensor, const dsk_args *args, const dsk_args *on_device, const int32_t *skip,
                  uint64_t stream) {
  return step(tensor, nullptr, nullptr, 1, 0, args, on_device, skip, stream);
}

// `count` tensors, described on the device; `chunks` as in kernels.cuh, `all_chunks` its last entry.
int dsk_cuda_step_list(const dsk_tensor *list, const int64_t *chunks, int64_t count, int64_t all_chunks,
                       const dsk_args *args, const dsk_args *on_device, const int32_t *skip, uint64_t stream) {
  return step(nullptr, list, chunks, count, all_chunks, args, on_device, skip, stream);
}

// `total`: sum of the squares of the tensors' `g`; `sums` has room for a double per chunk. All on the device.
int dsk_cuda_sum_of_squares(const dsk_tensor *list, const int64_t *chunks, int64_t count, int64_t all_chunks,
                            double *sums, double *total, int32_t *not_finite, uint64_t stream) {
  DSK_LAUNCH(dsk_squares, blocks_for(all_chunks), kThreads, stream_of(stream), list, chunks, count, sums);
  DSK_LAUNCH(dsk_total, 1, kThreads, stream_of(stream), sums, all_chunks, total, not_finite);
  return static_cast<int>(cudaGetLastError());
}
}
