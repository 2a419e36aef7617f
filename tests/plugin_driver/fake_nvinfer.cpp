// libnvinfer's two functions that a plugin library calls, and a registry that keeps what it is given.
#include <cstdio>
#include <string>
#include <vector>

#include <NvInferRuntime.h>

using namespace nvinfer1;

namespace {

struct Entry {
    std::string name, version, name_space;
    void* creator;
};

class Registry : public IPluginRegistry {
  public:
    ~Registry() noexcept override = default;

#if NV_TENSORRT_MAJOR < 11
    bool registerCreator(IPluginCreator& creator, char const* name_space) noexcept override {
        return add(creator.getPluginName(), creator.getPluginVersion(), name_space, &creator);
    }
    IPluginCreator* const* getPluginCreatorList(int32_t*) const noexcept override { return nullptr; }
    IPluginCreator* getPluginCreator(char const* name, char const* version, char const* name_space) noexcept override {
        return static_cast<IPluginCreator*>(find(name, version, name_space));
    }
    bool deregisterCreator(IPluginCreator const&) noexcept override { return false; }
#endif
#if NV_TENSORRT_MAJOR >= 10
    bool registerCreator(IPluginCreatorInterface& creator, char const* name_space) noexcept override {
        std::string const kind = creator.getInterfaceInfo().kind;
#if NV_TENSORRT_MAJOR < 11
        if (kind == "PLUGIN CREATOR_V1") return registerCreator(static_cast<IPluginCreator&>(creator), name_space);
#endif
        auto& v3 = static_cast<IPluginCreatorV3One&>(creator);
        return kind == "PLUGIN CREATOR_V3ONE" &&
               add(v3.getPluginName(), v3.getPluginVersion(), name_space, static_cast<IPluginCreatorInterface*>(&v3));
    }
    IPluginCreatorInterface* const* getAllCreators(int32_t*) const noexcept override { return nullptr; }
    IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t*) noexcept override { return nullptr; }
    IPluginCreatorInterface* getCreator(char const* name, char const* version,
                                        char const* name_space) noexcept override {
        return static_cast<IPluginCreatorInterface*>(find(name, version, name_space));
    }
    bool deregisterCreator(IPluginCreatorInterface const&) noexcept override { return false; }
    IPluginResource* acquirePluginResource(char const*, IPluginResource*) noexcept override { return nullptr; }
    int32_t releasePluginResource(char const*) noexcept override { return 0; }
#endif
    void setErrorRecorder(IErrorRecorder*) noexcept override {}
    IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
    bool isParentSearchEnabled() const override { return true; }
    void setParentSearchEnabled(bool) override {}
    PluginLibraryHandle loadLibrary(char const*) noexcept override { return nullptr; }
    void deregisterLibrary(PluginLibraryHandle) noexcept override {}

    std::string list() const {
        std::string text;
        for (Entry const& e : entries_) text += e.name_space + "::" + e.name + " " + e.version + "\n";
        return text;
    }
    bool refuses = false;

  private:
    std::vector<Entry> entries_;

    void* find(std::string const& name, std::string const& version, std::string const& name_space) const {
        for (Entry const& e : entries_)
            if (e.name == name && e.version == version && e.name_space == name_space) return e.creator;
        return nullptr;
    }
    bool add(char const* name, char const* version, char const* name_space, void* creator) {
        if (refuses || find(name, version, name_space) != nullptr) return false;
        entries_.push_back({name, version, name_space, creator});
        return true;
    }
};

Registry registry;

class Log : public ILogger {
  public:
    void log(Severity, char const* message) noexcept override { std::printf("logged: %s\n", message); }
} logger;

}  // namespace

extern "C" {
__attribute__((visibility("default"))) IPluginRegistry* getPluginRegistry() noexcept { return &registry; }
__attribute__((visibility("default"))) ILogger* getLogger() noexcept { return &logger; }
__attribute__((visibility("default"))) char const* fake_registered() {
    static std::string text;
    text = registry.list();
    return text.c_str();
}
__attribute__((visibility("default"))) void fake_refuse() { registry.refuses = true; }
}
