#include "logging.h"

#include <atomic>
#include <cstdio>

#include <dlfcn.h>

#include "nvinfer_library.h"

namespace saw::trt {

namespace {

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};
std::atomic<nvinfer1::ILogger*> given_logger{nullptr};

nvinfer1::ILogger* find_logger() {
    if (auto* const finder = logger_finder.load())
        if (auto* const logger = finder->findLogger()) return logger;
    if (auto* const logger = given_logger.load()) return logger;
    using GetLogger = nvinfer1::ILogger* (*)() noexcept;
    auto const get = reinterpret_cast<GetLogger>(nvinfer_symbol("getLogger", /*load=*/false));
    return get == nullptr ? nullptr : get();
}

}  // namespace

void use_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept { logger_finder = finder; }

void use_logger(nvinfer1::ILogger* logger) noexcept { given_logger = logger; }

void log_error(char const* message) noexcept {
    try {
        if (auto* const logger = find_logger()) {
            logger->log(nvinfer1::ILogger::Severity::kERROR, message);
            return;
        }
    } catch (...) {
    }
    std::fprintf(stderr, "%s\n", message);
}

void* nvinfer_symbol(char const* name, bool load) noexcept {
    void* library = dlopen(kNvinferLibrary, RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr && load) library = dlopen(kNvinferLibrary, RTLD_LAZY);
    return library == nullptr ? nullptr : dlsym(library, name);
}

}  // namespace saw::trt
