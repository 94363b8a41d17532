#include "coordinator/text/ordered_json.h"

#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "coordinator/text/cat.h"
#include "coordinator/text/tokenizer_json.h"

namespace octet {
namespace {

using nlohmann::ordered_json;

class OrderedReader : public ordered_json::json_sax_t {
 public:
  explicit OrderedReader(std::string_view name) : name_(name) {}

  const absl::Status& status() const { return status_; }
  ordered_json take() { return std::move(root_); }

  bool null() override { return add(nullptr); }
  bool boolean(bool flag) override { return add(flag); }
  bool number_integer(int64_t number) override { return add(number); }
  bool number_unsigned(uint64_t number) override { return add(number); }
  bool number_float(double number, const std::string&) override { return add(number); }
  bool string(std::string& text) override { return add(std::move(text)); }
  bool binary(ordered_json::binary_t&) override { return fail("binary values are not JSON"); }
  bool start_object(size_t) override { return open(ordered_json::object()); }
  bool start_array(size_t) override { return open(ordered_json::array()); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }
  bool key(std::string& key) override {
    Level& level = levels_.back();
    if (!level.keys.insert(key).second) return fail(cat("key '", key, "' appears twice"));
    level.key = std::move(key);
    return true;
  }
  bool parse_error(size_t position, const std::string&, const nlohmann::detail::exception&) override {
    return fail(cat("not valid JSON at byte ", position));
  }

 private:
  struct Level {
    ordered_json* container;  // stays where it is: nothing is added beside it while it is open
    std::set<std::string> keys = {};
    std::string key = {};
  };

  bool fail(std::string_view what) {
    if (status_.ok()) status_ = absl::InvalidArgumentError(cat(name_, ": ", what));
    return false;
  }

  ordered_json* place(ordered_json value) {
    if (levels_.empty()) return &(root_ = std::move(value));
    Level& level = levels_.back();
    if (level.container->is_array()) return &level.container->emplace_back(std::move(value));
    // Not through the object's own functions: they look for the key first, and key() has done so in less time.
    std::vector<std::pair<const std::string, ordered_json>>& members =
        *level.container->get_ptr<ordered_json::object_t*>();
    return &members.emplace_back(std::move(level.key), std::move(value)).second;
  }
  bool add(ordered_json value) {
    place(std::move(value));
    return true;
  }
  bool open(ordered_json container) {
    if (levels_.size() == kMaxJsonDepth) return fail(cat("nested deeper than ", kMaxJsonDepth, " levels"));
    levels_.push_back({place(std::move(container))});
    return true;
  }
  bool close() {
    levels_.pop_back();
    return true;
  }

  const std::string name_;
  absl::Status status_;
  std::vector<Level> levels_;
  ordered_json root_;
};

}  // namespace

absl::StatusOr<ordered_json> read_ordered_json(std::string_view text, std::string_view name) {
  OrderedReader reader(name);
  ordered_json::sax_parse(text, &reader);
  if (!reader.status().ok()) return reader.status();
  return reader.take();
}

std::string compact_json(const ordered_json& value) {
  return value.dump(-1, ' ', /*ensure_ascii=*/false, ordered_json::error_handler_t::replace);
}

std::string brief_json(const ordered_json& value) {
  constexpr size_t kMaxBytes = 40;
  if (value.is_object()) return "an object";
  if (value.is_array()) return "a list";
  const std::string text = compact_json(value);
  return text.size() <= kMaxBytes ? text : cat("a text of ", text.size() - 2, " bytes");
}

}  // namespace octet
