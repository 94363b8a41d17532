#include "launch/fault.h"

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "kernels/check.h"

namespace octet {
namespace {

const std::map<std::string, Fault::Kind>& kinds() {
  static const std::map<std::string, Fault::Kind> kKinds = {{"segv", Fault::Kind::kSegv},
                                                            {"check", Fault::Kind::kCheck},
                                                            {"hang", Fault::Kind::kHang},
                                                            {"exit", Fault::Kind::kExit},
                                                            {"slow", Fault::Kind::kSlow}};
  return kKinds;
}

template <typename Number>
bool parse_number(const std::string& text, std::optional<Number>* number) {
  return absl::SimpleAtoi(text, &number->emplace());
}

bool parse_part(const std::string& key, const std::string& value, Fault* fault) {
  if (key == "rank") return parse_number(value, &fault->rank);
  if (key == "step") return parse_number(value, &fault->step);
  if (key == "token") return parse_number(value, &fault->token);
  const auto kind = kinds().find(value);
  if (key != "kind" || kind == kinds().end()) return false;
  fault->kind = kind->second;
  return true;
}

bool strikes(const Fault& fault, const StepPlan& plan) {
  if (plan.stop) return false;
  if (fault.step.has_value() && plan.step >= *fault.step) return true;
  return fault.token.has_value() && std::ranges::any_of(plan.run, [&](const SlotTokens& run) {
           return std::ranges::find(run.tokens, *fault.token) != run.tokens.end();
         });
}

void strike(Fault::Kind kind) {
  switch (kind) {
    case Fault::Kind::kSegv:
      raise(SIGSEGV);
      break;
    case Fault::Kind::kCheck:
      OCTET_CHECK(false, "an injected fault");
      break;
    case Fault::Kind::kHang:
      while (true) pause();
    case Fault::Kind::kExit:
      _exit(7);
    case Fault::Kind::kSlow:  // a small model's steps end before a test can come between
      usleep(20'000);
  }
}

}  // namespace

absl::StatusOr<Fault> parse_fault(const std::string& text) {
  Fault fault;
  for (const std::string& part : std::vector<std::string>(absl::StrSplit(text, ','))) {
    const std::pair<std::string, std::string> pair = absl::StrSplit(part, absl::MaxSplits('=', 1));
    if (parse_part(pair.first, pair.second, &fault)) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("a fault is like rank=1,step=20,kind=segv or token=123,kind=hang, of kind segv, check, hang, exit "
                     "or slow; found \"",
                     part, "\""));
  }
  if (fault.step.has_value() == fault.token.has_value()) {
    return absl::InvalidArgumentError(absl::StrCat("a fault needs a step or a token; found \"", text, "\""));
  }
  return fault;
}

WorkerFunction with_fault(const Fault& fault, int rank, WorkerFunction run) {
  if (fault.rank.value_or(rank) != rank) return run;
  return [fault, run = std::move(run)](const StepPlan& plan) {
    if (strikes(fault, plan)) strike(fault.kind);
    return run(plan);
  };
}

}  // namespace octet
