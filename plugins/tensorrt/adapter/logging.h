// Messages through TensorRT's logger.
#pragma once

#include <NvInferRuntime.h>

namespace saw::trt {

// Of the application, where TensorRT loads the library itself; may be null.
void use_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;
// Of who registers the plugins; null: TensorRT's own.
void use_logger(nvinfer1::ILogger* logger) noexcept;

void log_error(char const* message) noexcept;

// A function that libnvinfer exports, or null. The library is not linked: whichever of this major version the process
// has loaded serves, from a system or from a Python package; `load` opens it where none is yet.
void* nvinfer_symbol(char const* name, bool load) noexcept;

}  // namespace saw::trt
