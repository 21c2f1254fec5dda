// Decode tokens greedily with a package of qcompile.package, by libtorch alone: no Python and no compiler.
//
//   decode MODEL.pt2 TOKENS ID [ID ..]        prints the new ids
//
// The package must have been made on a processor with the instructions of this one, for this version of libtorch.

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <caffe2/serialize/inline_container.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <sstream>
#include <stdexcept>

using at::Tensor;
using Weights = std::unordered_map<std::string, Tensor>;  // of one graph, by its own names
using Archive = caffe2::serialize::PyTorchStreamReader;
using Loader = torch::inductor::AOTIModelPackageLoader;

const std::map<std::string, at::ScalarType> dtypes{
    {"bool", at::kBool},   {"uint8", at::kByte}, {"int8", at::kChar},     {"int16", at::kShort},     {"int32", at::kInt},
    {"int64", at::kLong}, {"float16", at::kHalf}, {"bfloat16", at::kBFloat16}, {"float32", at::kFloat}, {"float64", at::kDouble}};

std::string read(Archive& archive, const std::string& name) {
  auto [data, size] = archive.getRecord("data/qcompile/" + name);
  return {static_cast<const char*>(data.get()), size};
}

// Our operators, which register themselves.
void load_operators(Archive& archive) {
  std::string folder = (std::filesystem::temp_directory_path() / "qcompile-XXXXXX").string();
  if (!mkdtemp(folder.data())) throw std::runtime_error("no temporary folder");
  const std::string file = folder + "/operators.so";
  std::ofstream(file, std::ios::binary) << read(archive, "operators.so");
  const bool loaded = dlopen(file.c_str(), RTLD_NOW | RTLD_GLOBAL);
  const std::string why = loaded ? "" : dlerror();
  std::filesystem::remove_all(folder);
  if (!loaded) throw std::runtime_error(why);
}

// The weights of each graph, mapped from the file. Lines are: graph, name, record, dtype, check, dimensions, sizes, strides.
std::map<std::string, Weights> map_weights(Archive& archive, const std::string& path) {
  const auto bytes = static_cast<int64_t>(std::filesystem::file_size(path));
  const Tensor mapped = at::from_file(path, /*shared=*/false, bytes, at::kByte);
  std::map<std::string, Weights> found;
  std::istringstream lines(read(archive, "weights.txt"));
  std::string graph, name, record, dtype;
  for (int64_t check, dimensions; lines >> graph >> name >> record >> dtype >> check >> dimensions;) {
    std::vector<int64_t> sizes(dimensions), strides(dimensions);
    for (auto& size : sizes) lines >> size;
    for (auto& stride : strides) lines >> stride;
    const auto start = static_cast<int64_t>(archive.getRecordOffset("data/weights/" + record));
    const auto type = dtypes.at(dtype);
    int64_t count = 1;
    for (auto size : sizes) count *= size;
    const Tensor flat = mapped.narrow(0, start, count * static_cast<int64_t>(c10::elementSize(type))).view(type);
    found[graph].emplace(name, flat.as_strided(sizes, strides));
  }
  return found;
}

int main(int argc, char** argv) try {
  if (argc < 4) throw std::runtime_error("usage: decode MODEL.pt2 TOKENS ID [ID ..]");
  const c10::InferenceMode inference;
  const std::string path = argv[1];
  const int64_t tokens = std::stoll(argv[2]), read_first = argc - 3;
  Tensor ids = at::empty({1, read_first}, at::kLong);
  for (int64_t i = 0; i < read_first; i++) ids.data_ptr<int64_t>()[i] = std::stoll(argv[3 + i]);

  Archive archive(path);
  load_operators(archive);
  auto weights = map_weights(archive, path);
  Loader prompt(path, "prompt"), step(path, "step");
  prompt.load_constants(weights.at("prompt"), false, true, /*user_managed=*/true);
  step.load_constants(weights.at("step"), false, true, /*user_managed=*/true);

  // A buffer for the keys and one for the values of each layer: heads and width of each.
  auto metadata = step.get_metadata();
  const auto dtype = dtypes.at(metadata.at("cache_dtype"));
  std::istringstream shapes(metadata.at("cache"));
  std::vector<Tensor> buffers;
  for (int64_t heads, width; shapes >> heads >> width;)
    buffers.push_back(at::zeros({1, heads, read_first + tokens + 1, width}, dtype));

  for (int64_t past = 0, made = 0; made < tokens; made++) {
    const int64_t count = ids.size(1);
    std::vector<Tensor> inputs{ids, at::arange(past, past + count).unsqueeze(0), at::ones({1, past + count}, at::kLong)};
    inputs.insert(inputs.end(), buffers.begin(), buffers.end());
    const auto found = (count == 1 ? step : prompt).run(inputs);  // logits of the last token, new keys and values
    for (size_t i = 0; i < buffers.size(); i++) buffers[i].narrow(2, past, count).copy_(found[i + 1]);
    past += count;
    ids = found[0].argmax(-1);
    std::cout << ids.item<int64_t>() << (made + 1 < tokens ? " " : "\n") << std::flush;
  }
} catch (const std::exception& error) {
  std::cerr << "decode: " << error.what() << "\n";
  return 1;
}
