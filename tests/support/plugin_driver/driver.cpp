// saw_plugin_driver: plays TensorRT's part for a plugin library, from TensorRT's headers alone. It finds the creators
// as IPluginRegistry::loadLibrary does, and calls a plugin's methods in both interfaces as an engine would.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <deque>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include <NvInferRuntime.h>
#include <dlfcn.h>

namespace py = pybind11;
using namespace nvinfer1;

namespace {

constexpr bool kHasV3 = NV_TENSORRT_MAJOR >= 10;
constexpr bool kHasV2 = NV_TENSORRT_MAJOR < 11;

using Shape = std::vector<int64_t>;

class Log : public ILogger {
  public:
    std::vector<std::string> messages;
    void log(Severity severity, char const* message) noexcept override {
        if (severity <= Severity::kERROR) messages.emplace_back(message);
    }
};

class LogFinder : public ILoggerFinder {
  public:
    ILogger* findLogger() override { return &log; }
    Log log;
};

LogFinder& log_finder() {
    static auto* const finder = new LogFinder;
    return *finder;
}

// Dimensions that are plain numbers.
class ExprValue : public apiv::VDimensionExpr {
  public:
    explicit ExprValue(int64_t value) : value(value) {}
    bool isConstant() const override { return true; }
#if NV_TENSORRT_MAJOR >= 10
    int64_t getConstantValue() const override { return value; }
    bool isSizeTensor() const override { return false; }
#else
    int32_t getConstantValue() const override { return int32_t(value); }
#endif
    int64_t const value;
};

class Expr : public IDimensionExpr {
  public:
    explicit Expr(int64_t value) : value_(value) { mImpl = &value_; }
    ~Expr() noexcept override = default;

  private:
    ExprValue value_;
};

class ExprMaker : public apiv::VExprBuilder {
  public:
    IDimensionExpr const* number(int64_t value) { return &made_.emplace_back(value); }
#if NV_TENSORRT_MAJOR >= 10
    IDimensionExpr const* constant(int64_t value) override { return number(value); }
    IDimensionExpr const* declareSizeTensor(int32_t, IDimensionExpr const&, IDimensionExpr const&) override {
        return nullptr;
    }
#else
    IDimensionExpr const* constant(int32_t value) override { return number(value); }
#endif
    IDimensionExpr const* operation(DimensionOperation, IDimensionExpr const&, IDimensionExpr const&) override {
        return nullptr;
    }

  private:
    std::deque<Expr> made_;
};

class Exprs : public IExprBuilder {
  public:
    Exprs() { mImpl = &maker; }
    ~Exprs() noexcept override = default;
    ExprMaker maker;

    std::vector<DimsExprs> of(std::vector<Shape> const& shapes) {
        std::vector<DimsExprs> result;
        for (Shape const& shape : shapes) {
            DimsExprs dims{};
            dims.nbDims = int32_t(shape.size());
            for (size_t i = 0; i < shape.size(); ++i) dims.d[i] = maker.number(shape[i]);
            result.push_back(dims);
        }
        return result;
    }
};

Shape numbers(DimsExprs const& dims) {
    if (dims.nbDims < 0) throw std::runtime_error("the plugin gave no shape");
    Shape shape;
    for (int i = 0; i < dims.nbDims; ++i) shape.push_back(dims.d[i]->getConstantValue());
    return shape;
}

Dims to_dims(Shape const& shape) {
    Dims dims{};
    dims.nbDims = int32_t(shape.size());
    for (size_t i = 0; i < shape.size(); ++i) dims.d[i] = static_cast<std::decay_t<decltype(dims.d[0])>>(shape[i]);
    return dims;
}

PluginTensorDesc to_desc(Shape const& shape, int type = 0, int format = 0) {
    PluginTensorDesc desc{};
    desc.dims = to_dims(shape);
    desc.type = DataType(type);
    desc.format = TensorFormat(format);
    return desc;
}

std::vector<PluginTensorDesc> to_descs(std::vector<Shape> const& shapes) {
    std::vector<PluginTensorDesc> descs;
    for (Shape const& s : shapes) descs.push_back(to_desc(s));
    return descs;
}

std::vector<DynamicPluginTensorDesc> to_dynamic(std::vector<PluginTensorDesc> const& descs) {
    std::vector<DynamicPluginTensorDesc> result;
    for (auto const& d : descs) {
        DynamicPluginTensorDesc dynamic{};
        dynamic.desc = d;
        dynamic.min = dynamic.max = d.dims;
        result.push_back(dynamic);
    }
    return result;
}

// name, PluginFieldType, bytes (or None), length
using FieldTuple = std::tuple<std::string, int, py::object, int>;

int element_bytes(PluginFieldType type) {
    switch (type) {
        case PluginFieldType::kCHAR:
        case PluginFieldType::kINT8:
            return 1;
        case PluginFieldType::kFLOAT64:
            return 8;
        default:
            return 4;
    }
}

py::list to_list(PluginFieldCollection const& collection) {
    py::list result;
    for (int i = 0; i < collection.nbFields; ++i) {
        PluginField const& f = collection.fields[i];
        py::object data = py::none();
        if (f.data != nullptr) data = py::bytes(static_cast<char const*>(f.data), f.length * element_bytes(f.type));
        result.append(py::make_tuple(f.name, int(f.type), data, f.length));
    }
    return result;
}

class FieldsGiven {
  public:
    explicit FieldsGiven(std::vector<FieldTuple> const& given) {
        for (auto const& [name, type, data, length] : given) {
            names_.push_back(name);
            data_.push_back(data.is_none() ? std::string() : std::string(py::cast<py::bytes>(data)));
            fields_.emplace_back(names_.back().c_str(), data.is_none() ? nullptr : data_.back().data(),
                                 PluginFieldType(type), length);
        }
        collection.nbFields = int32_t(fields_.size());
        collection.fields = fields_.data();
    }
    PluginFieldCollection collection{};

  private:
    std::deque<std::string> names_, data_;
    std::vector<PluginField> fields_;
};

// Addresses of one launch.
struct Bindings {
    std::vector<PluginTensorDesc> input_descs, output_descs;
    std::vector<void const*> inputs;
    std::vector<void*> outputs;

    Bindings(std::vector<std::pair<uintptr_t, Shape>> const& in, std::vector<uintptr_t> const& out) {
        for (auto const& [address, shape] : in) {
            inputs.push_back(reinterpret_cast<void const*>(address));
            input_descs.push_back(to_desc(shape));
        }
        for (uintptr_t address : out) outputs.push_back(reinterpret_cast<void*>(address));
        output_descs.resize(out.size());
    }
};

class Plugin {
  public:
    virtual ~Plugin() = default;
    virtual std::tuple<std::string, std::string, std::string> identity() = 0;
    virtual int num_outputs() = 0;
    virtual std::vector<int> output_types(int num_inputs) = 0;
    virtual std::vector<Shape> output_shapes(std::vector<Shape> const& inputs) = 0;
    virtual bool supports(int pos, int type, int format, int num_inputs, int num_outputs) = 0;
    virtual int configure(std::vector<Shape> const& inputs) = 0;
    virtual int on_shape_change(std::vector<Shape> const& inputs) = 0;
    virtual size_t workspace_bytes() = 0;
    virtual py::object serialized() = 0;
    virtual std::unique_ptr<Plugin> clone() = 0;
    virtual std::unique_ptr<Plugin> attach_to_context() = 0;
    virtual int enqueue(Bindings const& b, uintptr_t workspace, uintptr_t stream) = 0;
};

#if NV_TENSORRT_MAJOR < 11
class V2 : public Plugin {
  public:
    explicit V2(IPluginV2* plugin) : p_(static_cast<IPluginV2DynamicExt*>(plugin)) {}
    ~V2() override { p_->destroy(); }

    std::tuple<std::string, std::string, std::string> identity() override {
        return {p_->getPluginType(), p_->getPluginVersion(), p_->getPluginNamespace()};
    }
    int num_outputs() override { return p_->getNbOutputs(); }
    std::vector<int> output_types(int num_inputs) override {
        std::vector<DataType> const given(num_inputs);
        std::vector<int> types;
        for (int i = 0; i < num_outputs(); ++i)
            types.push_back(int(p_->getOutputDataType(i, given.data(), num_inputs)));
        return types;
    }
    std::vector<Shape> output_shapes(std::vector<Shape> const& inputs) override {
        Exprs exprs;
        auto const given = exprs.of(inputs);
        std::vector<Shape> result;
        for (int i = 0; i < num_outputs(); ++i)
            result.push_back(numbers(p_->getOutputDimensions(i, given.data(), int(given.size()), exprs)));
        return result;
    }
    bool supports(int pos, int type, int format, int num_inputs, int num_outputs) override {
        std::vector<PluginTensorDesc> descs(num_inputs + num_outputs);
        descs.at(pos) = to_desc({}, type, format);
        return p_->supportsFormatCombination(pos, descs.data(), num_inputs, num_outputs);
    }
    int configure(std::vector<Shape> const& inputs) override {
        auto const descs = to_dynamic(to_descs(inputs));
        p_->configurePlugin(descs.data(), int(descs.size()), nullptr, num_outputs());
        return 0;
    }
    int on_shape_change(std::vector<Shape> const&) override { return 0; }
    size_t workspace_bytes() override { return p_->getWorkspaceSize(nullptr, 0, nullptr, 0); }
    py::object serialized() override {
        std::string bytes(p_->getSerializationSize(), '\0');
        p_->serialize(bytes.data());
        return py::bytes(bytes);
    }
    std::unique_ptr<Plugin> clone() override { return std::make_unique<V2>(p_->clone()); }
    std::unique_ptr<Plugin> attach_to_context() override {
        if (p_->initialize() != 0) return nullptr;
        auto copy = std::make_unique<V2>(p_->clone());
        copy->p_->attachToContext(nullptr, nullptr, nullptr);
        return copy;
    }
    int enqueue(Bindings const& b, uintptr_t workspace, uintptr_t stream) override {
        return p_->enqueue(b.input_descs.data(), b.output_descs.data(), b.inputs.data(), b.outputs.data(),
                           reinterpret_cast<void*>(workspace), reinterpret_cast<cudaStream_t>(stream));
    }

  private:
    IPluginV2DynamicExt* p_;
};
#endif

#if NV_TENSORRT_MAJOR >= 10
class V3 : public Plugin {
  public:
    explicit V3(IPluginV3* plugin) : p_(plugin) {
        core_ = static_cast<IPluginV3OneCore*>(p_->getCapabilityInterface(PluginCapabilityType::kCORE));
        build_ = static_cast<IPluginV3OneBuild*>(p_->getCapabilityInterface(PluginCapabilityType::kBUILD));
        run_ = static_cast<IPluginV3OneRuntime*>(p_->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
        for (IPluginCapability* c : {static_cast<IPluginCapability*>(core_), static_cast<IPluginCapability*>(build_),
                                     static_cast<IPluginCapability*>(run_)})
            if (c == nullptr) throw std::runtime_error("the plugin lacks a capability");
        if (std::string(p_->getInterfaceInfo().kind) != "PLUGIN" ||
            std::string(core_->getInterfaceInfo().kind) != "PLUGIN_V3ONE_CORE" ||
            std::string(build_->getInterfaceInfo().kind) != "PLUGIN_V3ONE_BUILD" ||
            std::string(run_->getInterfaceInfo().kind) != "PLUGIN_V3ONE_RUNTIME")
            throw std::runtime_error("a capability is not the interface that was asked for");
    }
    ~V3() override { delete p_; }

    std::tuple<std::string, std::string, std::string> identity() override {
        return {core_->getPluginName(), core_->getPluginVersion(), core_->getPluginNamespace()};
    }
    int num_outputs() override { return build_->getNbOutputs(); }
    std::vector<int> output_types(int num_inputs) override {
        std::vector<DataType> const given(num_inputs);
        std::vector<DataType> types(num_outputs());
        check(build_->getOutputDataTypes(types.data(), num_outputs(), given.data(), num_inputs));
        std::vector<int> result;
        for (DataType t : types) result.push_back(int(t));
        return result;
    }
    std::vector<Shape> output_shapes(std::vector<Shape> const& inputs) override {
        Exprs exprs;
        auto const given = exprs.of(inputs);
        std::vector<DimsExprs> dims(num_outputs());
        check(build_->getOutputShapes(given.data(), int(given.size()), nullptr, 0, dims.data(), num_outputs(), exprs));
        std::vector<Shape> result;
        for (auto const& d : dims) result.push_back(numbers(d));
        return result;
    }
    bool supports(int pos, int type, int format, int num_inputs, int num_outputs) override {
        std::vector<DynamicPluginTensorDesc> descs(num_inputs + num_outputs);
        descs.at(pos).desc = to_desc({}, type, format);
        return build_->supportsFormatCombination(pos, descs.data(), num_inputs, num_outputs);
    }
    int configure(std::vector<Shape> const& inputs) override {
        auto const descs = to_dynamic(to_descs(inputs));
        return build_->configurePlugin(descs.data(), int(descs.size()), nullptr, num_outputs());
    }
    int on_shape_change(std::vector<Shape> const& inputs) override {
        auto const descs = to_descs(inputs);
        return run_->onShapeChange(descs.data(), int(descs.size()), nullptr, num_outputs());
    }
    size_t workspace_bytes() override { return build_->getWorkspaceSize(nullptr, 0, nullptr, 0); }
    py::object serialized() override { return to_list(*run_->getFieldsToSerialize()); }
    std::unique_ptr<Plugin> clone() override { return std::make_unique<V3>(p_->clone()); }
    std::unique_ptr<Plugin> attach_to_context() override {
        auto* const copy = run_->attachToContext(nullptr);
        return copy == nullptr ? nullptr : std::make_unique<V3>(copy);
    }
    int enqueue(Bindings const& b, uintptr_t workspace, uintptr_t stream) override {
        return run_->enqueue(b.input_descs.data(), b.output_descs.data(), b.inputs.data(), b.outputs.data(),
                             reinterpret_cast<void*>(workspace), reinterpret_cast<cudaStream_t>(stream));
    }

  private:
    IPluginV3* p_;
    IPluginV3OneCore* core_;
    IPluginV3OneBuild* build_;
    IPluginV3OneRuntime* run_;

    static void check(int32_t error) {
        if (error != 0) throw std::runtime_error("the plugin rejected");
    }
};
#endif

class Creator {
  public:
#if NV_TENSORRT_MAJOR >= 10
    explicit Creator(IPluginCreatorInterface* creator) {
        std::string const kind = creator->getInterfaceInfo().kind;
        if (kind == "PLUGIN CREATOR_V3ONE") v3_ = static_cast<IPluginCreatorV3One*>(creator);
#if NV_TENSORRT_MAJOR < 11
        if (kind == "PLUGIN CREATOR_V1") v2_ = static_cast<IPluginCreator*>(creator);
#endif
    }
#else
    explicit Creator(IPluginCreator* creator) : v2_(creator) {}
#endif

    // interface, name, version, namespace
    std::tuple<std::string, std::string, std::string, std::string> identity() {
#if NV_TENSORRT_MAJOR >= 10
        if (v3_ != nullptr) return {"V3", v3_->getPluginName(), v3_->getPluginVersion(), v3_->getPluginNamespace()};
#endif
#if NV_TENSORRT_MAJOR < 11
        if (v2_ != nullptr) return {"V2", v2_->getPluginName(), v2_->getPluginVersion(), v2_->getPluginNamespace()};
#endif
        throw std::runtime_error("a creator of neither interface");
    }

    py::list fields() {
#if NV_TENSORRT_MAJOR >= 10
        if (v3_ != nullptr) return to_list(*v3_->getFieldNames());
#endif
#if NV_TENSORRT_MAJOR < 11
        return to_list(*v2_->getFieldNames());
#else
        return py::list();
#endif
    }

    std::unique_ptr<Plugin> create(std::vector<FieldTuple> const& given) {
        FieldsGiven const fields(given);
#if NV_TENSORRT_MAJOR >= 10
        if (v3_ != nullptr) return wrap(v3_->createPlugin("layer", &fields.collection, TensorRTPhase::kBUILD));
#endif
#if NV_TENSORRT_MAJOR < 11
        return wrap(v2_->createPlugin("layer", &fields.collection));
#else
        return nullptr;
#endif
    }

    // From what serialized() gave.
    std::unique_ptr<Plugin> deserialize(py::object const& data) {
#if NV_TENSORRT_MAJOR >= 10
        if (v3_ != nullptr) {
            FieldsGiven const fields(py::cast<std::vector<FieldTuple>>(data));
            return wrap(v3_->createPlugin("layer", &fields.collection, TensorRTPhase::kRUNTIME));
        }
#endif
#if NV_TENSORRT_MAJOR < 11
        std::string const bytes = py::cast<py::bytes>(data);
        return wrap(v2_->deserializePlugin("layer", bytes.data(), bytes.size()));
#else
        return nullptr;
#endif
    }

  private:
#if NV_TENSORRT_MAJOR >= 10
    IPluginCreatorV3One* v3_ = nullptr;
    static std::unique_ptr<Plugin> wrap(IPluginV3* plugin) {
        return plugin == nullptr ? nullptr : std::make_unique<V3>(plugin);
    }
#endif
#if NV_TENSORRT_MAJOR < 11
    IPluginCreator* v2_ = nullptr;
    static std::unique_ptr<Plugin> wrap(IPluginV2* plugin) {
        return plugin == nullptr ? nullptr : std::make_unique<V2>(plugin);
    }
#endif
};

class Library {
  public:
    explicit Library(std::string const& path) : handle_(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {
        if (handle_ == nullptr) throw std::runtime_error(dlerror());
        reinterpret_cast<void (*)(ILoggerFinder*)>(symbol("setLoggerFinder"))(&log_finder());
    }

    std::vector<Creator> creators() {
        int32_t count = 0;
        std::vector<Creator> result;
#if NV_TENSORRT_MAJOR >= 10
        auto const get_v3 = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(symbol("getCreators"));
        auto const v3 = get_v3(count);
        for (int i = 0; i < count; ++i) result.emplace_back(v3[i]);
#endif
#if NV_TENSORRT_MAJOR < 11
        auto const get_v2 = reinterpret_cast<IPluginCreator* const* (*)(int32_t&)>(symbol("getPluginCreators"));
        auto const v2 = get_v2(count);
        for (int i = 0; i < count; ++i) result.emplace_back(v2[i]);
#endif
        return result;
    }

    bool init() { return reinterpret_cast<bool (*)(void*)>(symbol("initSawTrtllmPlugins"))(nullptr); }

  private:
    void* handle_;

    void* symbol(char const* name) {
        void* const found = dlsym(handle_, name);
        if (found == nullptr) throw std::runtime_error(std::string("the library does not export ") + name);
        return found;
    }
};

std::vector<std::string> take_messages() { return std::exchange(log_finder().log.messages, {}); }

}  // namespace

// A name of its own for each TensorRT, whose drivers one process may hold.
PYBIND11_MODULE(SAW_DRIVER_NAME, m) {
    m.attr("TENSORRT") = py::make_tuple(NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR);
    m.attr("HAS_V2") = kHasV2;
    m.attr("HAS_V3") = kHasV3;
    m.def("take_messages", &take_messages);

    // Local to the module: one process may hold a driver of each TensorRT.
    py::class_<Library>(m, "Library", py::module_local())
        .def(py::init<std::string const&>())
        .def("creators", &Library::creators)
        .def("init", &Library::init);
    py::class_<Creator>(m, "Creator", py::module_local())
        .def("identity", &Creator::identity)
        .def("fields", &Creator::fields)
        .def("create", &Creator::create)
        .def("deserialize", &Creator::deserialize);
    py::class_<Plugin>(m, "Plugin", py::module_local())
        .def("identity", &Plugin::identity)
        .def("num_outputs", &Plugin::num_outputs)
        .def("output_types", &Plugin::output_types)
        .def("output_shapes", &Plugin::output_shapes)
        .def("supports", &Plugin::supports)
        .def("configure", &Plugin::configure)
        .def("on_shape_change", &Plugin::on_shape_change)
        .def("workspace_bytes", &Plugin::workspace_bytes)
        .def("serialized", &Plugin::serialized)
        .def("clone", &Plugin::clone)
        .def("attach_to_context", &Plugin::attach_to_context)
        .def("enqueue", [](Plugin& plugin, std::vector<std::pair<uintptr_t, Shape>> const& inputs,
                           std::vector<uintptr_t> const& outputs, uintptr_t workspace,
                           uintptr_t stream) { return plugin.enqueue(Bindings(inputs, outputs), workspace, stream); });
}
