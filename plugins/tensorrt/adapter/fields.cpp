#include "fields.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "names.h"
#include "saw/common/pool.h"

namespace saw::trt {

namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

std::string listed(std::vector<Field> const& fields) {
    std::string names;
    for (Field const& f : fields) names += (names.empty() ? "" : ", ") + std::string(f.name);
    return names;
}

template <typename T>
T read_value(PluginField const& f) {
    T value;
    std::memcpy(&value, f.data, sizeof(T));
    return value;
}

[[noreturn]] void reject(Op const& op, PluginField const& f, char const* wanted) {
    throw PluginError(std::string(op.name()) + ": field " + f.name + " has PluginFieldType " +
                      std::to_string(int(f.type)) + " and length " + std::to_string(f.length) + ": give " + wanted);
}

int32_t int_value(Op const& op, PluginField const& f) {
    if (f.data != nullptr && f.length == 1) {
        if (f.type == PluginFieldType::kINT32) return read_value<int32_t>(f);
        if (f.type == PluginFieldType::kINT8) return read_value<int8_t>(f);
#if NV_TENSORRT_MAJOR >= 10
        if (f.type == PluginFieldType::kINT64) {
            auto const value = read_value<int64_t>(f);
            if (value == int32_t(value)) return int32_t(value);
        }
#endif
    }
    reject(op, f, "one INT32");
}

float float_value(Op const& op, PluginField const& f) {
    if (f.data != nullptr && f.length == 1) {
        if (f.type == PluginFieldType::kFLOAT32) return read_value<float>(f);
        if (f.type == PluginFieldType::kFLOAT64) return float(read_value<double>(f));
    }
    reject(op, f, "one FLOAT32");
}

// With or without a zero at its end.
std::string text_value(Op const& op, PluginField const& f) {
    if (f.data == nullptr || f.length < 1 || f.type != PluginFieldType::kCHAR) reject(op, f, "text (CHAR)");
    auto const* const begin = static_cast<char const*>(f.data);
    return {begin, std::find(begin, begin + f.length, '\0')};
}

void set(Op const& op, Field const& field, PluginField const& given) {
    if (auto* const* value = std::get_if<int32_t*>(&field.value)) {
        **value = int_value(op, given);
    } else if (auto* const* value = std::get_if<float*>(&field.value)) {
        **value = float_value(op, given);
    } else {
        *std::get<std::string*>(field.value) = text_value(op, given);
    }
}

// Sets the fields that are given, and returns the others. What follows the name of an unknown one is `advice`.
std::vector<Field const*> set_all(Op const& op, std::vector<Field> const& fields,
                                  nvinfer1::PluginFieldCollection const* given, std::string const& advice) {
    std::string const name = op.name();
    std::vector<Field const*> unset;
    for (Field const& f : fields) unset.push_back(&f);
    for (int i = 0; given != nullptr && i < given->nbFields; ++i) {
        PluginField const& f = given->fields[i];
        if (f.name == nullptr) throw PluginError(name + ": field " + std::to_string(i) + " has no name: give it one");
        auto const is_it = [&](Field const& field) { return std::strcmp(field.name, f.name) == 0; };
        auto const at = std::find_if(fields.begin(), fields.end(), is_it);
        if (at == fields.end()) throw PluginError(name + ": field " + f.name + " is unknown" + advice);
        auto const mark = std::find(unset.begin(), unset.end(), &*at);
        if (mark == unset.end()) throw PluginError(name + ": field " + f.name + " is given twice: give it once");
        unset.erase(mark);
        set(op, *at, f);
    }
    return unset;
}

PluginField described(Field const& f, bool with_value) {
    if (auto* const* value = std::get_if<int32_t*>(&f.value))
        return {f.name, with_value ? *value : nullptr, PluginFieldType::kINT32, 1};
    if (auto* const* value = std::get_if<float*>(&f.value))
        return {f.name, with_value ? *value : nullptr, PluginFieldType::kFLOAT32, 1};
    auto const* const text = std::get<std::string*>(f.value);
    if (!with_value) return {f.name, nullptr, PluginFieldType::kCHAR, 0};
    return {f.name, text->data(), PluginFieldType::kCHAR, int32_t(text->size())};
}

// A field in an engine: V2 plugins keep bytes.
struct Record {
    char name[24];
    int32_t type;
    int32_t length;
    char value[16];
};
struct Header {
    char magic[4];
    int32_t count;
};
constexpr char kMagic[4] = {'S', 'A', 'W', 'P'};

int32_t serialized_workspace(Op const& op) {
    size_t const bytes = op.workspace_bytes();
    if (bytes > size_t(std::numeric_limits<int32_t>::max()))
        throw PluginError(std::string(op.name()) + ": it needs a workspace of " + std::to_string(bytes) +
                          " bytes, and an engine keeps sizes below 2 GiB: give it fewer heads");
    return int32_t(bytes);
}

}  // namespace

FieldList::FieldList(Op& op, bool for_engine)
    : format_version_(kFormatVersion), workspace_bytes_(for_engine ? serialized_workspace(op) : 0) {
    if (for_engine) {
        fields_.emplace_back(names::kFormatVersionField, &format_version_, PluginFieldType::kINT32, 1);
        fields_.emplace_back(names::kWorkspaceBytesField, &workspace_bytes_, PluginFieldType::kINT32, 1);
    }
    for (Field const& f : op.fields()) fields_.push_back(described(f, for_engine));
    collection_.nbFields = int32_t(fields_.size());
    collection_.fields = fields_.data();
}

std::unique_ptr<Op> make_op(OpFactory factory, nvinfer1::PluginFieldCollection const* given) {
    auto op = factory();
    auto const fields = op->fields();
    auto const unset = set_all(*op, fields, given, ": the fields are " + listed(fields));
    for (Field const* f : unset)
        if (f->required) throw PluginError(std::string(op->name()) + ": field " + f->name + " is missing: give it");
    op->validate();
    return op;
}

std::unique_ptr<Op> make_op_of_engine(OpFactory factory, nvinfer1::PluginFieldCollection const* given) {
    auto op = factory();
    std::string const name = op->name();
    char const* const advice = ": rebuild the engine with this library, or load the library it was built with";
    int32_t format_version = kFormatVersion, workspace_bytes = 0;
    auto fields = op->fields();
    fields.insert(fields.begin(), {{names::kFormatVersionField, &format_version, true},
                                   {names::kWorkspaceBytesField, &workspace_bytes, true}});
    auto const unset = set_all(*op, fields, given, advice);
    if (format_version != kFormatVersion)
        throw PluginError(name + ": the engine stores cache format " + std::to_string(format_version) +
                          " and this library writes format " + std::to_string(kFormatVersion) + advice);
    for (Field const* f : unset)
        if (f->in_every_engine) throw PluginError(name + ": the engine lacks field " + f->name + advice);
    op->validate();
    // It grows with the GPU: an engine may come from one with fewer SMs.
    if (auto const needed = int64_t(op->workspace_bytes()); workspace_bytes < 0 || workspace_bytes < needed)
        throw PluginError(name + ": the engine gives it a workspace of " + std::to_string(workspace_bytes) +
                          " bytes and this GPU needs " + std::to_string(needed) + ": rebuild the engine on this GPU");
    return op;
}

size_t serialized_bytes(nvinfer1::PluginFieldCollection const& fields) {
    return sizeof(Header) + fields.nbFields * sizeof(Record);
}

void serialize(nvinfer1::PluginFieldCollection const& fields, void* buffer) {
    Header header{};
    std::memcpy(header.magic, kMagic, sizeof(kMagic));
    header.count = fields.nbFields;
    std::memcpy(buffer, &header, sizeof(header));
    auto* at = static_cast<char*>(buffer) + sizeof(header);
    for (int i = 0; i < fields.nbFields; ++i, at += sizeof(Record)) {
        PluginField const& f = fields.fields[i];
        size_t const bytes = f.type == PluginFieldType::kCHAR ? f.length : sizeof(int32_t);
        Record record{};
        if (std::strlen(f.name) >= sizeof(record.name) || bytes > sizeof(record.value))
            throw PluginError(std::string("field ") + f.name + " does not fit a record of an engine");
        std::strcpy(record.name, f.name);
        record.type = int32_t(f.type);
        record.length = f.length;
        std::memcpy(record.value, f.data, bytes);
        std::memcpy(at, &record, sizeof(record));
    }
}

std::unique_ptr<Op> deserialize_op(OpFactory factory, void const* data, size_t length) {
    Header header{};
    if (data != nullptr && length >= sizeof(header)) std::memcpy(&header, data, sizeof(header));
    if (std::memcmp(header.magic, kMagic, sizeof(kMagic)) != 0 || header.count < 0 ||
        length != sizeof(header) + header.count * sizeof(Record))
        throw PluginError(std::string(factory()->name()) + ": the engine's " + std::to_string(length) +
                          " bytes are not what this library writes: rebuild the engine");
    std::vector<Record> records(header.count);
    std::memcpy(records.data(), static_cast<char const*>(data) + sizeof(header), header.count * sizeof(Record));
    std::vector<PluginField> fields;
    for (Record& r : records) {
        r.name[sizeof(r.name) - 1] = '\0';
        r.length = std::clamp(r.length, 0, int32_t(sizeof(r.value)));
        fields.emplace_back(r.name, r.value, PluginFieldType(r.type), r.length);
    }
    nvinfer1::PluginFieldCollection collection{};
    collection.nbFields = int32_t(fields.size());
    collection.fields = fields.data();
    return make_op_of_engine(factory, &collection);
}

}  // namespace saw::trt
