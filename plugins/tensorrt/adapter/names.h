// Every name that a network definition and these plugins share. The tensors bear the names of TensorRT-LLM's executor.
#pragma once

namespace saw::trt::names {

constexpr char kNamespace[] = "saw";
// The cache format's version (saw/layout.h) is the plugins': an engine finds only a library that writes its rows.
constexpr char kVersion[] = "1";
// TensorRT 10 keeps one creator for a name and a version; this is the V2 adapters' there.
constexpr char kVersionOfV2[] = "1-v2";

constexpr char kRotateQuantizeKv[] = "SawRotateQuantizeKV";
constexpr char kInt4PagedAttention[] = "SawInt4PagedAttention";
constexpr char kGemm[] = "SawGemm";
constexpr char kQuantizedGemm[] = "SawQuantizedGemm";
constexpr char kLookup[] = "SawLookup";
constexpr char kRmsNorm[] = "SawRmsNorm";
constexpr char kSiluMul[] = "SawSiluMul";
constexpr char kAllReduce[] = "SawAllReduce";
constexpr char kAllGather[] = "SawAllGather";

// tensors
constexpr char kQkv[] = "qkv";
constexpr char kPositionIds[] = "position_ids";
constexpr char kLastTokenIds[] = "last_token_ids";
constexpr char kSequenceLength[] = "sequence_length";
constexpr char kBlockOffsets[] = "kv_cache_block_offsets";
constexpr char kPoolPointers[] = "host_kv_cache_pool_pointers";
constexpr char kPoolMapping[] = "host_kv_cache_pool_mapping";
constexpr char kRequestTypes[] = "host_request_types";
constexpr char kWindowSizes[] = "host_max_attention_window_sizes";
constexpr char kCosSin[] = "rotary_cos_sin";
constexpr char kKCenter[] = "k_center";
constexpr char kKFrame[] = "k_frame";
constexpr char kQFrame[] = "q_frame";
constexpr char kSinks[] = "sinks";
constexpr char kQ[] = "q";
constexpr char kK[] = "k";
constexpr char kV[] = "v";
constexpr char kDecodeCounters[] = "decode_counters";
constexpr char kContext[] = "context";
constexpr char kRows[] = "rows";
constexpr char kX[] = "x";
constexpr char kWeight[] = "weight";
constexpr char kScales[] = "scales";
constexpr char kResidual[] = "residual";
constexpr char kGate[] = "gate";
constexpr char kY[] = "y";
constexpr char kSum[] = "sum";

// fields
constexpr char kFormatVersionField[] = "format_version";    // this and the next in engines only: nobody gives them
constexpr char kWorkspaceBytesField[] = "workspace_bytes";  // on the GPU that built the engine
constexpr char kLayerIdx[] = "layer_idx";
constexpr char kNumHeads[] = "num_heads";
constexpr char kNumKvHeads[] = "num_kv_heads";
constexpr char kHeadDim[] = "head_dim";
constexpr char kTokensPerBlock[] = "tokens_per_block";
constexpr char kDtype[] = "dtype";
constexpr char kKvFormat[] = "kv";
constexpr char kHadamardOrder[] = "hadamard_order";
constexpr char kRotateV[] = "rotate_v";
constexpr char kRangeFactor[] = "range_factor";
constexpr char kUseKCenter[] = "use_k_center";
constexpr char kUseKFrame[] = "use_k_frame";
constexpr char kUseQFrame[] = "use_q_frame";
constexpr char kSoftmaxScale[] = "softmax_scale";
constexpr char kSoftcap[] = "softcap";
constexpr char kWindow[] = "window";
constexpr char kUseSinks[] = "use_sinks";
constexpr char kInFeatures[] = "in_features";
constexpr char kOutFeatures[] = "out_features";
constexpr char kOutputDtype[] = "output_dtype";
constexpr char kUseGate[] = "use_gate";
constexpr char kWeightType[] = "weight_type";
constexpr char kGroupSize[] = "group_size";
constexpr char kQuantizeInput[] = "quantize_input";
constexpr char kVocabSize[] = "vocab_size";
constexpr char kHiddenSize[] = "hidden_size";
constexpr char kEpsilon[] = "epsilon";
constexpr char kUseResidual[] = "use_residual";
constexpr char kUseNorm[] = "use_norm";
constexpr char kNumNormed[] = "num_normed";
constexpr char kNumRanks[] = "num_ranks";

}  // namespace saw::trt::names
