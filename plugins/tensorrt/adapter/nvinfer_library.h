// TensorRT's library, of the major version that these headers are of.
#pragma once

#include <NvInferVersion.h>

#define SAW_TEXT_OF(x) #x
#define SAW_TEXT(x) SAW_TEXT_OF(x)

namespace saw::trt {

constexpr char kNvinferLibrary[] = "libnvinfer.so." SAW_TEXT(NV_TENSORRT_MAJOR);

}  // namespace saw::trt

#undef SAW_TEXT
#undef SAW_TEXT_OF
