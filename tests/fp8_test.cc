// Narrow formats: golden conversions, and the host functions held against their definitions over all codes.
#include "kernels/fp8.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "kernels/cpu/e4m3_bytes.h"

namespace octet {
namespace {

TEST(Fp8, EncodesTheGoldenValues) {
  const struct {
    float value;
    uint8_t code;
  } goldens[] = {{448.0f, 0x7E}, {463.9f, 0x7E},        {464.0f, 0x7E},      {464.1f, 0x7E},        {1e30f, 0x7E},
                 {-1e30f, 0xFE}, {0.0009765625f, 0x00}, {0.00097657f, 0x01}, {0.0146484375f, 0x08}, {17.0f, 0x58},
                 {18.0f, 0x59},  {19.0f, 0x5A},         {1.0625f, 0x38},     {1.1875f, 0x3A},       {-1e-30f, 0x80},
                 {0.0f, 0x00},   {-0.0f, 0x80},         {0.015625f, 0x08},   {0.001953125f, 0x01},  {-448.0f, 0xFE}};
  for (const auto& golden : goldens) EXPECT_EQ(float_to_e4m3(golden.value), golden.code) << golden.value;
  EXPECT_EQ(float_to_e4m3(std::numeric_limits<float>::infinity()), 0x7E);
  EXPECT_EQ(float_to_e4m3(-std::numeric_limits<float>::infinity()), 0xFE);
  EXPECT_EQ(float_to_e4m3(std::numeric_limits<float>::quiet_NaN()), 0x7F);
}

// (-1)^S * M * 2^-9 for E = 0, (-1)^S * (1 + M/8) * 2^(E-7) otherwise; S1111111 is NaN.
TEST(Fp8, DecodesEveryCodeByItsDefinition) {
  for (int code = 0; code < 256; ++code) {
    const int exponent = code >> 3 & 15;
    const int mantissa = code & 7;
    const double magnitude = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(1 + mantissa / 8.0, exponent - 7);
    const float value = e4m3_to_float(static_cast<uint8_t>(code));
    if ((code & 0x7F) == 0x7F) {
      EXPECT_TRUE(std::isnan(value));
      EXPECT_TRUE(is_e4m3_nan(static_cast<uint8_t>(code)));
      continue;
    }
    EXPECT_EQ(value, code & 0x80 ? -magnitude : magnitude);
    EXPECT_EQ(std::signbit(value), (code & 0x80) != 0);
    EXPECT_EQ(float_to_e4m3(value), code);
    EXPECT_EQ(float_to_bf16(value), cpu::bf16_of_e4m3(code));
    EXPECT_EQ(bf16_to_float(float_to_bf16(value)), value);
  }
}

TEST(Fp8, RoundsEveryMidpointToTheEvenCode) {
  for (int code = 0; code < 0x7E; ++code) {
    const float low = e4m3_to_float(static_cast<uint8_t>(code));
    const float high = e4m3_to_float(static_cast<uint8_t>(code + 1));
    const float middle = (low + high) / 2;
    EXPECT_EQ(float_to_e4m3(middle), code % 2 == 0 ? code : code + 1) << middle;
    EXPECT_EQ(float_to_e4m3(std::nextafter(middle, 0.0f)), code);
    EXPECT_EQ(float_to_e4m3(std::nextafter(middle, 1e9f)), code + 1);
    EXPECT_EQ(float_to_e4m3(-middle), 0x80 | (code % 2 == 0 ? code : code + 1));
  }
}

TEST(Bf16, RoundsToTheNearestEven) {
  EXPECT_EQ(float_to_bf16(1.0f), 0x3F80);
  EXPECT_EQ(float_to_bf16(1.00390625f), 0x3F80);  // halfway between 1 and 1 + 2^-7: down to even
  EXPECT_EQ(float_to_bf16(1.01171875f), 0x3F82);  // halfway again: up to even
  EXPECT_EQ(float_to_bf16(1.00390637f), 0x3F81);
  EXPECT_EQ(float_to_bf16(-2.5f), 0xC020);
  EXPECT_EQ(float_to_bf16(3.4e38f), 0x7F80);  // beyond the largest
  EXPECT_EQ(float_to_bf16(std::numeric_limits<float>::infinity()), 0x7F80);
  EXPECT_EQ(float_to_bf16(1e-40f), 0x0001);  // denormals are kept by conversions
  EXPECT_TRUE(std::isnan(bf16_to_float(float_to_bf16(std::bit_cast<float>(0x7F800001u)))));
}

}  // namespace
}  // namespace octet
