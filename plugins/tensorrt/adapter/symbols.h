// The functions of a library that is loaded when it is needed.
#pragma once

#include <string>

#include <dlfcn.h>

#include "adapter/op.h"

namespace saw::trt {

// Sets `function` to the library's of that name; `library_name` and `remedy` are for who lacks it.
template <typename Function>
void find_symbol(void* library, char const* library_name, char const* remedy, char const* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    if (function == nullptr) throw PluginError(std::string(library_name) + " has no " + name + ": " + remedy);
}

}  // namespace saw::trt
