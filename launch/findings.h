// Findings: what is fine, doubtful or wrong about a job, each with what to do about it (pure).
#pragma once

#include <string>
#include <vector>

#include "launch/job_facts.h"
#include "nlohmann/json.hpp"

namespace octet {

enum class FindingLevel { kOk, kWarning, kFailure };

struct Finding {
  FindingLevel level = FindingLevel::kOk;
  std::string check;       // "binding"
  std::vector<int> ranks;  // whom it concerns, ascending
  std::string message;
  std::string remedy;  // empty where there is nothing to do
};

// One finding or more for every check, in the order of the checks. What several ranks have in common is said once.
std::vector<Finding> judge(const JobFacts& job);

bool any_failure(const std::vector<Finding>& findings);

// "rank 3", "ranks 0-2, 5".
std::string name_ranks(const std::vector<int>& ranks);

// Lines of text, each ended by a newline.
std::string to_text(const std::vector<Finding>& findings);
nlohmann::ordered_json to_json(const std::vector<Finding>& findings);

}  // namespace octet
