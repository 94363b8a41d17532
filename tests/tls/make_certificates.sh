#!/usr/bin/env bash
# Makes the certificates of access_test, for a hundred years: an authority, a server of it, a client of it, and an authority
# that nobody trusts with a client of its own. Their keys protect nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

authority() {  # NAME
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 36500 -subj "/CN=octet test $1" \
    -keyout "$1.key" -out "$1.pem"
}

certificate() {  # NAME AUTHORITY EXTENSION
  openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=octet test $1" -keyout "$1.key" -out "$1.csr"
  openssl x509 -req -in "$1.csr" -CA "$2.pem" -CAkey "$2.key" -CAcreateserial -days 36500 -extfile <(echo "$3") -out "$1.pem"
  rm "$1.csr"
}

authority ca
authority stranger_ca
certificate server ca "subjectAltName=DNS:localhost,IP:127.0.0.1"
certificate client ca "extendedKeyUsage=clientAuth"
certificate stranger stranger_ca "extendedKeyUsage=clientAuth"
rm -f ca.key stranger_ca.key ./*.srl
