// A graph that was compiled in parts: libraries of AOTInductor, called one behind the other.
//
// Equal blocks are calls of one library with other weights. One call from Python runs all of them; values between them stay
// here, and are freed behind their last reader.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/custom_class.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace qcompile {

class LibraryCalls : public torch::CustomClassHolder {
 public:
  using Places = std::vector<int64_t>;

  // Values have places: `inputs` of the caller's, then `constants`, then what calls give, `values` in all. A call is four
  // lists: {library}, places that it reads, that it writes, and that nobody reads behind it.
  LibraryCalls(std::string archive, std::vector<std::string> libraries, std::vector<at::Tensor> constants, int64_t inputs,
               int64_t values, std::vector<Places> calls, Places results)
      : constants_(std::move(constants)), inputs_(inputs), values_(values), results_(std::move(results)) {
    const auto own = inputs_ + int64_t(constants_.size());
    demand(inputs_ >= 0 && own <= values_ && calls.size() % 4 == 0, "inconsistent sizes");
    const auto within = [&](const Places& places, int64_t from) {
      for (const auto place : places) demand(place >= from && place < values_, "place ", place, " of ", values_, " values");
    };
    within(results_, 0);
    for (size_t at = 0; at + 4 <= calls.size(); at += 4) {
      demand(calls[at].size() == 1 && calls[at][0] >= 0 && calls[at][0] < int64_t(libraries.size()), "no such library");
      within(calls[at + 1], 0), within(calls[at + 2], own), within(calls[at + 3], own);
      calls_.push_back({size_t(calls[at][0]), calls[at + 1], calls[at + 2], calls[at + 3]});
    }
    for (const auto& name : libraries)
      libraries_.push_back(std::make_unique<torch::inductor::AOTIModelPackageLoader>(archive, name));
  }

  std::vector<at::Tensor> run(std::vector<at::Tensor> given) {
    demand(int64_t(given.size()) == inputs_, given.size(), " inputs, but must be ", inputs_);
    auto values = std::move(given);
    values.reserve(values_);
    values.insert(values.end(), constants_.begin(), constants_.end());
    values.resize(values_);
    for (const auto& call : calls_) {
      std::vector<at::Tensor> read;
      read.reserve(call.reads.size());
      for (const auto place : call.reads) read.push_back(values[place]);
      auto found = libraries_[call.library]->boxed_run(std::move(read));
      demand(found.size() == call.writes.size(), found.size(), " results, but must be ", call.writes.size());
      for (size_t i = 0; i < found.size(); i++) values[call.writes[i]] = std::move(found[i]);
      for (const auto place : call.dead) values[place] = at::Tensor();
    }
    std::vector<at::Tensor> found;
    found.reserve(results_.size());
    for (const auto place : results_) found.push_back(values[place]);
    return found;
  }

 private:
  struct Step {
    size_t library;
    Places reads, writes, dead;
  };

  template <class... Words>
  static void demand(bool holds, const Words&... words) {
    if (!holds) C10_THROW_ERROR(ValueError, c10::str("qcompile_cpu::LibraryCalls: ", words...));
  }

  std::vector<std::unique_ptr<torch::inductor::AOTIModelPackageLoader>> libraries_;
  std::vector<at::Tensor> constants_;
  int64_t inputs_, values_;
  std::vector<Step> calls_;
  Places results_;
};

}  // namespace qcompile

TORCH_LIBRARY_FRAGMENT(qcompile_cpu, m) {
  m.class_<qcompile::LibraryCalls>("LibraryCalls")
      .def(torch::init<std::string, std::vector<std::string>, std::vector<at::Tensor>, int64_t, int64_t,
                       std::vector<qcompile::LibraryCalls::Places>, qcompile::LibraryCalls::Places>())
      .def("run", &qcompile::LibraryCalls::run);
}
