// The functions by which torch's runner (AOTIModelContainerRunner) loads and calls a library.
//
// Inductor's own version of them also serves weights, several copies of a model and the folding of
// constants. Our libraries have none of these, and the compiler spends twice as long on them as on
// everything else. NUMBER_OF_OUTPUTS is defined before this text.

#include <array>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <torch/csrc/inductor/aoti_runtime/scalar_to_tensor.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

namespace torch::aot_inductor {

using DeviceStreamType = void*;

struct AOTInductorModelKernelsBase {
  virtual ~AOTInductorModelKernelsBase() = default;
};

struct AOTInductorModel {
  void run_impl(
      AtenTensorHandle* inputs,
      AtenTensorHandle* outputs,
      DeviceStreamType,
      AOTIProxyExecutorHandle);

  std::unique_ptr<AOTInductorModelKernelsBase> kernels_;
  int32_t device_idx_ = 0;
};

}  // namespace torch::aot_inductor

static thread_local std::string last_error;

extern "C" {

AOTIRuntimeError AOTInductorModelContainerCreateWithDevice(
    void** model, size_t, const char*, const char*) {
  *model = new torch::aot_inductor::AOTInductorModel();
  return AOTI_RUNTIME_SUCCESS;
}

AOTIRuntimeError AOTInductorModelContainerDelete(void* model) {
  delete static_cast<torch::aot_inductor::AOTInductorModel*>(model);
  return AOTI_RUNTIME_SUCCESS;
}

// Callers turn gradients off, and calls from several threads share nothing.
AOTIRuntimeError AOTInductorModelContainerRun(
    void* model,
    AtenTensorHandle* inputs,
    size_t,
    AtenTensorHandle* outputs,
    size_t,
    void* stream,
    AOTIProxyExecutorHandle proxy_executor) {
  try {
    static_cast<torch::aot_inductor::AOTInductorModel*>(model)->run_impl(
        inputs, outputs, stream, proxy_executor);
    return AOTI_RUNTIME_SUCCESS;
  } catch (const std::exception& error) {
    last_error = error.what();
  } catch (...) {
    last_error = "unknown exception";
  }
  return AOTI_RUNTIME_FAILURE;
}

AOTIRuntimeError AOTInductorModelContainerGetNumOutputs(void*, size_t* number) {
  *number = NUMBER_OF_OUTPUTS;
  return AOTI_RUNTIME_SUCCESS;
}

AOTIRuntimeError AOTInductorModelContainerGetNumConstants(void*, size_t* number) {
  *number = 0;
  return AOTI_RUNTIME_SUCCESS;
}

AOTIRuntimeError AOTInductorGetLastError(const char** text) {
  *text = last_error.c_str();
  return AOTI_RUNTIME_SUCCESS;
}

// The runner looks these up when it loads a library, and calls them only if there are constants.
#define ONLY_FOR_CONSTANTS(NAME) \
  AOTIRuntimeError NAME() {      \
    return AOTI_RUNTIME_FAILURE; \
  }
ONLY_FOR_CONSTANTS(AOTInductorModelContainerGetConstantName)
ONLY_FOR_CONSTANTS(AOTInductorModelContainerGetConstantOriginalFQN)
ONLY_FOR_CONSTANTS(AOTInductorModelContainerGetConstantDtype)
ONLY_FOR_CONSTANTS(AOTInductorModelContainerRunConstantFolding)
ONLY_FOR_CONSTANTS(AOTInductorModelContainerUpdateConstantBuffer)
ONLY_FOR_CONSTANTS(AOTInductorModelContainerUpdateInactiveConstantBuffer)
ONLY_FOR_CONSTANTS(AOTInductorModelContainerSwapConstantBuffer)
ONLY_FOR_CONSTANTS(AOTInductorModelContainerGetCallSpec)
ONLY_FOR_CONSTANTS(AOTInductorModelContainerExtractConstantsMap)
ONLY_FOR_CONSTANTS(AOTInductorModelContainerFreeInactiveConstantBuffer)
ONLY_FOR_CONSTANTS(AOTInductorModelContainerUpdateUserManagedConstantBuffer)
ONLY_FOR_CONSTANTS(AOTInductorModelContainerUpdateConstantBufferFromCpu)
ONLY_FOR_CONSTANTS(AOTInductorModelContainerGetConstantsBlobSize)
ONLY_FOR_CONSTANTS(AOTInductorModelUpdateConstantsFromBlob)

}  // extern "C"
